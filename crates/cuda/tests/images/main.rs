//! What names an image, what is found in the cache, and what happens without a compiler. No GPU; where libnvrtc is
//! installed the real kernels go through it, otherwise its absence has to be said.

use std::cell::Cell;

use cuda::CudaError;
use cuda::images::{Activations, Compiler, Kv, Numbers, Places, Request, Shape};
use cuda::nvrtc::Nvrtc;
use cuda::program::{Bases, Formats, Program, Settings};
use cuda::schedule::{Schedule, Shard};
use cuda::strips::Format;
use model::Config;

/// A compiler that counts what it is asked.
struct Fake {
    identity: &'static str,
    works: bool,
    asked: Cell<u32>,
}

impl Fake {
    fn new(identity: &'static str, works: bool) -> Self {
        Self {
            identity,
            works,
            asked: Cell::new(0),
        }
    }
}

impl Compiler for Fake {
    fn identity(&self) -> String {
        self.identity.into()
    }

    fn compile(&self, request: &Request<'_>) -> Result<Vec<u8>, CudaError> {
        self.asked.set(self.asked.get() + 1);
        match self.works {
            true => Ok(format!("{} by {}", request.kernel, self.identity).into_bytes()),
            false => Err(CudaError::Compile {
                kernel: request.kernel.into(),
                reason: format!("{} is broken", self.identity),
            }),
        }
    }
}

const SOURCES: [(&str, &str); 2] = [("a.cu", "one"), ("a.cuh", "two")];

fn request(shape: Shape) -> Request<'static> {
    Request {
        kernel: "a.cu",
        arch: "sm_90a",
        shape,
        sources: &SOURCES,
    }
}

fn shape(ranks: usize) -> Shape {
    Shape {
        header: Some(format!("#define SHAPE_RANKS {ranks}")),
        ..Shape::default()
    }
}

#[test]
fn everything_that_matters_is_in_the_name() {
    let base = request(shape(8));
    let other_text = [("a.cu", "one"), ("a.cuh", "2")];
    let others = [
        request(shape(4)),
        request(Shape::default()),
        request(shape(8).with(Activations::E4m3)),
        request(shape(8).with(Kv::Fp8)),
        Request {
            arch: "sm_100a",
            ..base.clone()
        },
        Request {
            kernel: "a.cuh",
            ..base.clone()
        },
        Request {
            sources: &other_text,
            ..base.clone()
        },
    ];
    assert_eq!(
        base.file("nvrtc 13.0"),
        request(shape(8)).file("nvrtc 13.0")
    );
    assert_ne!(base.file("nvrtc 13.0"), base.file("nvrtc 12.9"));
    for other in others {
        assert_ne!(base.stem(), other.stem(), "{other:?}");
    }
}

#[test]
fn an_image_is_compiled_once_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places {
        cache: dir.path().join("not/there/yet"),
        shipped: None,
    };
    let good = Fake::new("good", true);
    for _ in 0..2 {
        let image = places.image(&request(shape(8)), &[&good], &[]).unwrap();
        assert_eq!(image, b"a.cu by good");
    }
    assert_eq!(good.asked.get(), 1);
    places.image(&request(shape(1)), &[&good], &[]).unwrap();
    assert_eq!(good.asked.get(), 2, "another shape");
    let names = std::fs::read_dir(&places.cache).unwrap().flatten();
    let aside = |name: &std::ffi::OsString| name.to_string_lossy().ends_with(".part");
    assert!(!names.map(|e| e.file_name()).any(|n| aside(&n)));
}

#[test]
fn a_broken_compiler_is_passed_over_and_old_images_serve_without_any() {
    let dir = tempfile::tempdir().unwrap();
    let shipped = tempfile::tempdir().unwrap();
    let places = Places {
        cache: dir.path().to_owned(),
        shipped: Some(shipped.path().to_owned()),
    };
    let (broken, good) = (Fake::new("broken", false), Fake::new("good", true));
    let wanted = request(shape(8));
    let nothing = places.image(&wanted, &[&broken], &["no nvcc".into()]);
    let line = nothing.unwrap_err().to_string();
    assert!(
        line.contains("no nvcc") && line.contains("broken is broken") && !line.contains('\n'),
        "{line}"
    );
    let built = shipped.path().join(wanted.file("built in CI"));
    std::fs::write(&built, b"shipped").unwrap();
    let image = places.image(&wanted, &[&good], &[]).unwrap();
    assert_eq!((&image[..], good.asked.get()), (&b"shipped"[..], 0));
    let other = places.image(&request(shape(4)), &[], &[]);
    assert!(other.is_err(), "an image of another shape does not serve");
    std::fs::remove_file(built).unwrap();
    let made = places.image(&wanted, &[&broken, &good], &[]).unwrap();
    assert_eq!(made, b"a.cu by good");
    let image = places.image(&wanted, &[&broken], &[]).unwrap();
    assert_eq!(
        image, b"a.cu by good",
        "of another compiler, from the cache"
    );
}

/// Rank 0 of 8 of MiMo-V2.5-Pro on an H200.
fn pro(numbers: Numbers) -> Result<Program, CudaError> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../bench/configs/mimo-v2.5-pro.json"
    );
    let config = Config::from_json(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (rank, ranks, ctas) = (0, 8, 132);
    let schedule = Schedule::new(&config, Shard { rank, ranks, ctas }).unwrap();
    let formats = Formats::release(&config, Format::Fp8);
    let context = 1024;
    let settings = Settings { context, numbers };
    Program::new(&config, &schedule, &formats, settings, Bases::NOWHERE)
}

/// Of the Pro twice the activations do not fit in shared memory: refused with what would.
#[test]
fn activations_that_do_not_fit_are_refused() {
    assert!(pro(Kv::Wide.into()).is_ok());
    let refused = pro(Numbers::wide()).unwrap_err().to_string();
    for said in ["at most 3072", "one term", "found 6144"] {
        assert!(refused.contains(said), "{refused}");
    }
}

#[test]
fn the_kernels_go_through_nvrtc_or_its_absence_is_said() {
    let nvrtc = match Nvrtc::open() {
        Ok(nvrtc) => nvrtc,
        Err(e) => {
            assert!(e.to_string().contains("libnvrtc"), "{e}");
            return;
        }
    };
    for (kernel, shape) in [
        ("ops.cu", Shape::default()),
        ("resident.cu", Shape::of(&pro(Numbers::default()).unwrap())),
    ] {
        let image = nvrtc.compile(&Request::new(kernel, shape)).unwrap();
        assert_eq!(&image[..4], b"\x7fELF", "{kernel}");
    }
}
