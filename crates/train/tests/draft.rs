//! The drafter's phase: kill and resume gives the same bytes; answers too short to draft are no error.

mod support;

use tch::Tensor;
use train::draft::{Drafting, Settings};
use train::drafter::Plan;
use train::sample::Answer;
use train::state;

fn settings() -> Settings {
    Settings {
        steps: 10,
        tokens: 256,
        anchors: 4,
        gamma: 4.0,
        distill: 0.5,
        copy: 0.5,
        muon: true,
        fp8: true,
        seed: 9,
        eval_every: 5,
        save_every: 4,
        eval_answers: 2,
        optimizer: support::optimizer(),
        drafter: Plan {
            layers: 1,
            ffn: 64,
            block: 4,
            window: 64,
            taps: vec![0, 2],
            sinks: true,
            theta: 1e4,
            mask_token: 3,
        },
    }
}

/// `count` answers of `length` tokens after a prompt of 8.
fn answers(count: u16, length: u16) -> Vec<Answer> {
    let tokens = |i: u16| (0..8 + length).map(|j| (i * 7 + j * 5) % 96).collect();
    let answer = |i| Answer {
        domain: 0,
        greedy: true,
        prompt: 8,
        tokens: tokens(i),
    };
    (0..count).map(answer).collect()
}

#[test]
fn resumed_equals_unbroken() {
    let _turn = support::turn();
    tch::set_num_threads(1);
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let target = support::net(support::shape(), false);
    let settings = settings();
    let names = ["text".to_owned()];
    let start = || Drafting::new(&target, &settings, answers(12, 100)).expect("starts");
    start()
        .run(&path.join("whole"), &names, false)
        .expect("runs");
    // A kill after the checkpoint of step 4: the others are done again.
    let mut broken = start();
    let before: Vec<f64> = (0..4).map(|_| broken.advance()[0]).collect();
    assert!(before.iter().all(|loss| *loss > 0.0), "{before:?}");
    std::fs::create_dir_all(path.join("broken")).expect("a directory");
    let state = path.join("broken/state.safetensors");
    state::save(&state, &broken.drafter.params, None, broken.step).expect("saves");
    start()
        .run(&path.join("broken"), &names, true)
        .expect("resumes");
    let bytes = |out: &str| std::fs::read(path.join(out).join("state.safetensors")).expect("reads");
    assert!(bytes("whole") == bytes("broken"), "resumed bytes differ");
}

/// One anchor among 128 positions rarely falls into an answer of 8.
#[test]
fn batches_without_a_mask_change_nothing_and_end_well() {
    let _turn = support::turn();
    tch::set_num_threads(1);
    let directory = tempfile::tempdir().expect("a directory");
    let target = support::net(support::shape(), false);
    let settings = Settings {
        tokens: 128,
        anchors: 1,
        ..settings()
    };
    let start = || Drafting::new(&target, &settings, answers(12, 8)).expect("starts");
    let mut run = start();
    let all = |run: &Drafting<'_>| -> Vec<Tensor> {
        let groups = run.drafter.params.groups.iter();
        groups.map(|group| group.master.copy()).collect()
    };
    let mut empty = 0;
    for _ in 0..10 {
        let before = all(&run);
        if run.advance()[3] == 0.0 {
            empty += 1;
            let same = before.iter().zip(all(&run)).all(|(b, a)| a.equal(b));
            assert!(same, "weights moved without a mask to learn from");
        }
    }
    assert!(empty > 0, "no batch was empty: the test shows nothing");
    start()
        .run(directory.path(), &["text".to_owned()], false)
        .expect("runs to the end");
}
