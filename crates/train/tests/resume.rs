//! Kill and resume: the same bytes as an unbroken run; and the ten losses of a fixed tiny run.

mod support;

use train::data::Domain;
use train::distill::{Distillation, Settings};

fn settings() -> Settings {
    Settings {
        steps: 10,
        rows: 2,
        length: 128,
        seed: 5,
        balance: 0.01,
        mxfp4: true,
        fp8: true,
        eval_every: 100,
        eval_rows: 2,
        save_every: 4,
        optimizer: support::optimizer(),
        domains: vec![Domain {
            name: "text".into(),
            share: 1.0,
            distill: 0.3,
            copy: 0.7,
        }],
    }
}

fn losses(directory: &std::path::Path) -> Vec<f64> {
    let teacher = support::net(support::shape(), false);
    let settings = settings();
    let student = support::net(support::shape(), true);
    let mut run = Distillation::new(student, &teacher, &settings, directory).expect("starts");
    (0..10).map(|_| run.advance().loss).collect()
}

#[test]
fn ten_losses_repeat_and_fall() {
    let _turn = support::turn();
    tch::set_num_threads(1);
    let directory = tempfile::tempdir().expect("a directory");
    support::corpus(directory.path());
    let (first, second) = (losses(directory.path()), losses(directory.path()));
    assert_eq!(first, second);
    assert!(first[9] < first[0] - 0.1, "losses {first:?}");
}

#[test]
fn resumed_equals_unbroken() {
    let _turn = support::turn();
    tch::set_num_threads(1);
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    support::corpus(path);
    let teacher = support::net(support::shape(), false);
    let start = || support::net(support::shape(), true);
    let whole = settings();
    let run = |settings: &Settings, out: &str, resume: bool| {
        let mut run = Distillation::new(start(), &teacher, settings, path).expect("starts");
        run.run(&path.join(out), path, resume).expect("runs");
    };
    run(&whole, "whole", false);
    // A kill after the checkpoint of step 8: steps 9 and 10 are done again.
    let mut broken = Distillation::new(start(), &teacher, &whole, path).expect("starts");
    for _ in 0..8 {
        let _ = broken.advance();
    }
    let state = path.join("broken/state.safetensors");
    std::fs::create_dir_all(path.join("broken")).expect("a directory");
    let student = &broken.student;
    train::state::save(&state, &student.params, Some(&student.bias), broken.step).expect("saves");
    run(&whole, "broken", true);
    let bytes = |out: &str| std::fs::read(path.join(out).join("state.safetensors")).expect("reads");
    assert!(bytes("whole") == bytes("broken"), "resumed bytes differ");
}
