//! Fake quantisation gives the values that `formats` decodes, bit for bit.

use formats::mxfp4::ScaleRule;
use formats::{fp8, mxfp4};
use tch::{Device, Kind, Tensor};
use train::{files, quant};

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn decoded_mxfp4(values: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    for block in values.as_chunks::<{ mxfp4::BLOCK }>().0 {
        let (codes, scale) = mxfp4::encode_block(block, ScaleRule::Ocp);
        let mut back = [0.0; mxfp4::BLOCK];
        mxfp4::decode_block(&codes, scale, &mut back);
        out.extend(back);
    }
    out
}

#[test]
fn mxfp4_at_every_exponent_and_midpoint() {
    let mut values = Vec::new();
    for exponent in -60..60 {
        let scale = 2f32.powi(exponent);
        // Midpoints between codes, their neighbours, both signs; the block's largest is 6 or above.
        for largest in [4.0f32, 5.99, 6.0, 7.9] {
            let mut block = vec![largest * scale];
            for i in 0..31 {
                let x = i as f32 * 0.25 + if i % 3 == 0 { 1e-4 } else { 0.0 };
                block.push(x.min(largest) * scale * if i % 2 == 0 { 1.0 } else { -1.0 });
            }
            values.extend(block);
        }
    }
    values.extend([0.0f32; 32]);
    let tensor = Tensor::from_slice(&values).reshape([-1, 32]);
    let seen = files::tensor_values(&quant::mxfp4(&tensor));
    assert_eq!(bits(&seen), bits(&decoded_mxfp4(&values)));
}

#[test]
fn mxfp4_of_random_matrices() {
    tch::manual_seed(1);
    let tensor = Tensor::randn([48, 96], (Kind::Float, Device::Cpu)) * 0.03;
    let seen = files::tensor_values(&quant::mxfp4(&tensor));
    assert_eq!(
        bits(&seen),
        bits(&decoded_mxfp4(&files::tensor_values(&tensor)))
    );
}

#[test]
fn fp8_with_ragged_edges_and_fused_parts() {
    tch::manual_seed(2);
    let parts = [200i64, 72];
    let tensor = Tensor::randn([1, 272, 190], (Kind::Float, Device::Cpu));
    let seen = files::tensor_values(&quant::fp8(&tensor, &parts));
    let mut expected = Vec::new();
    let mut start = 0;
    for rows in parts {
        let part = tensor.get(0).narrow(0, start, rows);
        let (codes, scales) = fp8::encode_weight(&files::tensor_values(&part), rows as usize, 190);
        for (i, code) in codes.iter().enumerate() {
            let scale = scales[i / 190 / fp8::BLOCK * 2 + i % 190 / fp8::BLOCK];
            expected.push(fp8::decode(*code) * scale);
        }
        start += rows;
    }
    assert_eq!(bits(&seen), bits(&expected));
}
