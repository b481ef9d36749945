//! Gradients of every hand-written piece against finite differences, in f64 where the piece allows.

mod support;

use tch::{Device, Kind, Tensor, no_grad};
use train::drafter::{Blocks, Drafter, Plan};
use train::net::{Net, group};
use train::{drafter, loss, optim};

/// Compares an analytic gradient with central differences of `f` at a few elements of `x`.
fn check(x: &Tensor, grad: &Tensor, step: f64, tolerance: f64, f: &dyn Fn() -> f64) {
    let count = x.numel() as i64;
    let flat = x.detach().view([-1]);
    let typical = grad.norm().double_value(&[]) / (count as f64).sqrt();
    for i in 0..5 {
        let index = (i * count / 5 + i % 2).min(count - 1);
        let at = flat.get(index);
        let old = at.double_value(&[]);
        let set = |value: f64| no_grad(|| drop(at.shallow_clone().fill_(value)));
        set(old + step);
        let up = f();
        set(old - step);
        let down = f();
        set(old);
        let numeric = (up - down) / (2.0 * step);
        let analytic = grad.reshape([-1]).double_value(&[index]);
        // f32 sums carry noise of a few 1e-4: elements far below the typical one cannot be compared.
        let scale = numeric.abs().max(analytic.abs()).max(typical);
        assert!(
            (numeric - analytic).abs() <= tolerance * scale,
            "element {i}: difference {numeric}, gradient {analytic}"
        );
    }
}

#[test]
fn loss_on_logits() {
    let _turn = support::turn();
    tch::manual_seed(3);
    let options = (Kind::Double, Device::Cpu);
    let logits = Tensor::randn([6, 11], options);
    let taught = Tensor::randn([6, 11], options);
    let next = Tensor::from_slice(&[1i64, 4, 0, 10, 3, 3]);
    let distill = Tensor::rand([6, 1], options);
    let copy = Tensor::rand([6, 1], options);
    let value = || {
        let (ce, kl, _) = loss::chunk_loss(&logits, Some(&taught), &next, &distill, &copy);
        (ce * copy.squeeze_dim(-1) + kl * distill.squeeze_dim(-1))
            .sum(Kind::Double)
            .double_value(&[])
    };
    let (_, _, grad) = loss::chunk_loss(&logits, Some(&taught), &next, &distill, &copy);
    check(&logits, &grad, 1e-5, 1e-6, &value);
}

/// Sum of the last rows times fixed weights: a scalar that every parameter moves.
fn scalar(net: &Net, tokens: &Tensor) -> Tensor {
    let hidden = net.forward(tokens, &[]).hidden;
    let weights = Tensor::arange(hidden.numel() as i64, (Kind::Float, Device::Cpu)).sin();
    (hidden.reshape([-1]) * weights).sum(Kind::Double)
}

#[test]
fn router_attention_and_sinks() {
    let _turn = support::turn();
    // Choosing is a step function without a gradient; with all experts chosen no move crosses a step.
    let shape = train::shape::Shape {
        active: 4,
        ..support::shape()
    };
    let net = support::net(shape, true);
    let tokens = (Tensor::arange(256, (Kind::Int64, Device::Cpu)) * 7)
        .remainder(96)
        .reshape([1, 256]);
    scalar(&net, &tokens).backward();
    for group in [
        group::QKV,
        group::OUT,
        group::SINK,
        group::ROUTER,
        group::GATE_UP,
        group::DOWN,
    ] {
        let leaf = net.params.at(group, 1);
        let grad = leaf.grad();
        check(leaf, &grad, 2e-3, 0.06, &|| {
            no_grad(|| scalar(&net, &tokens).double_value(&[]))
        });
    }
}

#[test]
fn block_attention_of_the_drafter() {
    let _turn = support::turn();
    let target = support::net(support::shape(), false);
    let plan = Plan {
        layers: 2,
        ffn: 64,
        block: 4,
        window: 200,
        taps: vec![0, 2],
        sinks: true,
        theta: 10_000.0,
        mask_token: 5,
    };
    let drafter = Drafter::new(plan, target.shape.clone(), Device::Cpu, true, 5);
    let tokens = (Tensor::arange(256, (Kind::Int64, Device::Cpu)) * 5)
        .remainder(96)
        .reshape([1, 256]);
    let taps = no_grad(|| Tensor::cat(&target.forward(&tokens, &[0, 2]).taps, -1));
    let blocks = Blocks {
        anchors: Tensor::from_slice(&[3i64, 100, 130, 250]).reshape([1, 2, 2]),
    };
    let value = || {
        let rows = drafter.forward(&taps, &tokens, target.embedding(), &blocks);
        let weights = Tensor::arange(rows.numel() as i64, (Kind::Float, Device::Cpu)).cos();
        (rows.reshape([-1]) * weights).sum(Kind::Double)
    };
    value().backward();
    use drafter::group::{FC, GATE_UP, KV, MASK, Q, SINK};
    for group in [FC, Q, KV, SINK, GATE_UP, MASK] {
        let leaf = drafter.params.at(group, 0);
        let grad = leaf.grad();
        check(leaf, &grad, 2e-3, 0.06, &|| {
            no_grad(|| value().double_value(&[]))
        });
    }
}

#[test]
fn straight_through_gives_the_master_the_gradient_of_what_was_seen() {
    let _turn = support::turn();
    let mut net = support::net(support::shape(), true);
    net.quantize(true, true);
    let tokens = Tensor::arange(128, (Kind::Int64, Device::Cpu))
        .remainder(96)
        .reshape([1, 128]);
    scalar(&net, &tokens).backward();
    let group = &net.params.groups[group::DOWN];
    assert_ne!(
        group.master, group.shadow,
        "the forward pass sees rounded weights"
    );
    let stacked = group.grad().expect("a gradient");
    assert_eq!(stacked.get(1), net.params.at(group::DOWN, 1).grad());
}

#[test]
fn muon_against_its_definition_in_f64() {
    let _turn = support::turn();
    tch::manual_seed(4);
    for size in [[3i64, 8, 8], [2, 24, 8], [2, 8, 40]] {
        let x = Tensor::randn(size, (Kind::Double, Device::Cpu));
        let fast = optim::newton_schulz(&x.to_kind(Kind::Float)).to_kind(Kind::Double);
        for i in 0..size[0] {
            // By singular values: each goes through the same quintic five times.
            let one = x.get(i);
            let (u, s, v) = one.svd(true, true);
            let mut s = &s / one.square().sum(Kind::Double).sqrt();
            for _ in 0..5 {
                let cube = s.pow_tensor_scalar(3);
                s = &s * 3.4445 + &cube * -4.775 + s.pow_tensor_scalar(5) * 2.0315;
            }
            let exact = (u * s.unsqueeze(0)).matmul(&v.tr());
            let error =
                (&exact - fast.get(i)).norm().double_value(&[]) / exact.norm().double_value(&[]);
            assert!(error < 1e-4, "size {size:?}: relative error {error}");
        }
    }
}
