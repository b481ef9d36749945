//! The golden checkpoints and the released layouts open, and every weight has its rows.

use std::path::PathBuf;

use model::weights::FfnWeights;
use model::{Checkpoint, Config, Weights};

fn goldens() -> Vec<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens/mimo");
    let mut dirs: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    dirs.sort();
    assert!(dirs.len() >= 6, "one folder a layout");
    dirs
}

#[test]
fn every_golden_opens() {
    for dir in goldens() {
        let config = Config::load(&dir).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let weights = Weights::new(&config, &checkpoint).unwrap();
        assert_eq!(weights.layers.len(), config.layers.len());
        for layer in &weights.layers {
            let mut matrices = vec![&layer.q, &layer.k, &layer.v, &layer.o];
            match &layer.ffn {
                FfnWeights::Dense(f) => matrices.extend([&f.gate, &f.up, &f.down]),
                FfnWeights::Moe {
                    router, experts, ..
                } => {
                    matrices.push(router);
                    matrices.extend(experts.iter().flat_map(|e| [&e.gate, &e.up, &e.down]));
                }
            }
            for matrix in matrices {
                let mut row = vec![0.0; matrix.cols];
                for r in 0..matrix.rows {
                    matrix.row(r).decode(&mut row);
                    assert!(row.iter().all(|x| x.is_finite()), "{dir:?} row {r}");
                }
            }
        }
    }
}
