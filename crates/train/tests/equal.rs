//! The trainer's forward pass against the engine's definition, and sampling against teacher forcing.

mod support;

use tch::{Device, Kind, Tensor, no_grad};
use train::export::{self, Form};
use train::sample::{Request, sample};
use train::weights;

#[test]
fn exporting_and_loading_gives_the_same_model() {
    let _turn = support::turn();
    let directory = tempfile::tempdir().expect("a directory");
    let net = support::net(support::shape(), false);
    export::write(&net, directory.path(), Form::Master, directory.path()).expect("writes");
    let back = weights::load(directory.path(), Device::Cpu, false).expect("loads");
    assert_eq!(net.shape, back.shape);
    let tokens = Tensor::arange(128, (Kind::Int64, Device::Cpu))
        .remainder(96)
        .reshape([1, 128]);
    let (a, b) = no_grad(|| {
        (
            net.forward(&tokens, &[]).hidden,
            back.forward(&tokens, &[]).hidden,
        )
    });
    assert_eq!(a, b);
}

#[test]
fn a_quantised_export_is_what_training_saw() {
    let _turn = support::turn();
    let directory = tempfile::tempdir().expect("a directory");
    let mut net = support::net(support::shape(), false);
    net.quantize(true, true);
    export::write(&net, directory.path(), Form::Quantized, directory.path()).expect("writes");
    let back = weights::load(directory.path(), Device::Cpu, false).expect("loads");
    let tokens = Tensor::arange(128, (Kind::Int64, Device::Cpu))
        .remainder(96)
        .reshape([1, 128]);
    let (a, b) = no_grad(|| {
        (
            net.forward(&tokens, &[]).hidden,
            back.forward(&tokens, &[]).hidden,
        )
    });
    // Norms and sinks are stored in BF16.
    let error = (&a - &b).norm().double_value(&[]) / a.norm().double_value(&[]);
    assert!(error < 5e-3, "relative error {error}");
}

#[test]
fn greedy_sampling_says_what_teacher_forcing_predicts() {
    let _turn = support::turn();
    let net = support::net(support::shape(), false);
    let requests: Vec<Request> = (0..3u16)
        .map(|i| Request {
            domain: 0,
            tokens: (1..4 + i).collect(),
            temperature: 0.0,
        })
        .collect();
    for answer in sample(&net, &requests, 256, 1.0, 0).expect("samples") {
        let mut padded = vec![0i64; 256];
        for (to, &from) in padded.iter_mut().zip(&answer.tokens) {
            *to = i64::from(from);
        }
        let tokens = Tensor::from_slice(&padded).reshape([1, 256]);
        let hidden = no_grad(|| net.forward(&tokens, &[]).hidden);
        let likely = hidden
            .get(0)
            .matmul(&net.embedding().tr())
            .argmax(-1, false);
        let said = answer.tokens.len();
        let wrong = (answer.prompt..said)
            .filter(|&i| likely.int64_value(&[i as i64 - 1]) != i64::from(answer.tokens[i]))
            .count();
        assert!(
            wrong <= 1,
            "{wrong} of {} tokens differ",
            said - answer.prompt
        );
    }
}
