//! What this machine is: processor features, memory, read bandwidth, and what a GPU build would find.
//!
//! Read from `/proc` and by timing; nothing is changed.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use cpu::buffer::Buffer;

/// Features that choose a code path, by their names in /proc/cpuinfo.
const FEATURES: [&str; 9] = [
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
];

/// The processor as the kernel describes it.
pub(crate) struct Processor {
    pub name: String,
    /// Logical processors this program may use.
    pub threads: usize,
    /// Name and presence of each of the features above.
    pub features: Vec<(&'static str, bool)>,
}

/// Looks at the processor.
pub(crate) fn processor() -> Processor {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = info.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let flags = value("flags").unwrap_or_default();
    let has = |feature: &str| flags.split(' ').any(|flag| flag == feature);
    Processor {
        name: value("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        threads: threads(),
        features: FEATURES.map(|feature| (feature, has(feature))).to_vec(),
    }
}

/// Logical processors this program may use.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory: in all, and available to new programs.
pub(crate) fn memory_bytes() -> (u64, u64) {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = |key: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().split(' ').next()?.parse::<u64>().ok()
    };
    (
        value("MemTotal:").unwrap_or(0) * 1024,
        value("MemAvailable:").unwrap_or(0) * 1024,
    )
}

/// Bytes that this process may come to hold: what is available now, within the limit of its control groups.
/// `None` where the system does not say.
pub(crate) fn room_bytes() -> Option<u64> {
    let (_, available) = memory_bytes();
    let read = |file: &str| {
        let text = std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(file)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let limit = read("memory.max").zip(read("memory.current"));
    let group = limit.map_or(u64::MAX, |(max, now)| max.saturating_sub(now));
    (available > 0).then_some(available.min(group))
}

/// Plain-read bandwidth: threads that each sum their part of one large buffer, which lies in huge
/// pages as weights do.
pub(crate) struct ReadBandwidth {
    words: Buffer<u32>,
    threads: usize,
}

impl ReadBandwidth {
    /// Fills a buffer of about `bytes`, which should be larger than every cache.
    pub(crate) fn new(bytes: u64, threads: usize) -> Self {
        let mut words = Buffer::new((bytes / 4) as usize / 64 * 64);
        for (word, i) in words.as_mut_slice().iter_mut().zip(0..) {
            *word = i;
        }
        Self {
            words,
            threads: threads.max(1),
        }
    }

    /// One pass over the buffer, in bytes a second.
    pub(crate) fn pass(&mut self) -> f64 {
        let words = &*self.words.as_mut_slice();
        let part = words.len().div_ceil(self.threads).max(1);
        let began = Instant::now();
        std::thread::scope(|scope| {
            for words in words.chunks(part) {
                scope.spawn(move || black_box(sum(words)));
            }
        });
        (words.len() * 4) as f64 / began.elapsed().as_secs_f64()
    }

    /// Best of `passes`, in bytes a second.
    pub(crate) fn measure(&mut self, passes: u32) -> f64 {
        (0..passes).map(|_| self.pass()).fold(0.0, f64::max)
    }
}

/// Many running sums, so that the loads and not the additions are the limit.
fn sum(words: &[u32]) -> u32 {
    let mut sums = [0u32; 64];
    for chunk in words.as_chunks::<64>().0 {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |total, sum| total.wrapping_add(*sum))
}

/// What a GPU build looks for: a line each, found or not.
pub(crate) fn gpu() -> Vec<(&'static str, Option<String>)> {
    let library = |names: &[&str]| {
        let places = [
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib64",
            "/usr/local/cuda/lib64",
            "/usr/lib/aarch64-linux-gnu",
        ];
        let paths = places
            .iter()
            .flat_map(|place| names.iter().map(move |name| Path::new(place).join(name)));
        paths
            .into_iter()
            .find(|path| path.exists())
            .map(|path| path.display().to_string())
    };
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    vec![
        (
            "GPU driver 580 or newer",
            driver.and_then(|text| text.lines().next().map(str::to_owned)),
        ),
        ("libcuda.so.1", library(&["libcuda.so.1"])),
        ("NVRTC 13.0 (libnvrtc.so.13)", library(&["libnvrtc.so.13"])),
    ]
}
