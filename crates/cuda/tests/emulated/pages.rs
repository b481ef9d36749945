//! The layout generator and its inverse give back every byte, for every tile map.

use crate::cases::Random;
use cuda::pages::{
    Fp4Rows, Fp8Rows, TileRows, gate_up_tiles, pack_fp4, pack_fp8, plain_tiles, unpack_fp4,
    unpack_fp8,
};

fn fp4_round_trip(rows: usize, columns: usize, tiles: &[TileRows]) {
    let mut random = Random(rows as u64);
    let weight = Fp4Rows {
        columns,
        codes: (0..rows * columns / 2)
            .map(|_| random.bits() as u8)
            .collect(),
        scales: (0..rows * columns / 32)
            .map(|_| random.bits() as u8)
            .collect(),
    };
    let mut back = Fp4Rows {
        columns,
        codes: vec![0xAA; weight.codes.len()],
        scales: vec![0xAA; weight.scales.len()],
    };
    for tile in tiles {
        unpack_fp4(&pack_fp4(&weight, tile).unwrap(), tile, &mut back).unwrap();
    }
    assert!(weight == back);
}

fn fp8_round_trip(rows: usize, columns: usize, tiles: &[TileRows]) {
    let mut random = Random(rows as u64);
    let weight = Fp8Rows {
        columns,
        codes: (0..rows * columns).map(|_| random.bits() as u8).collect(),
        scales: (0..rows.div_ceil(128) * columns / 128)
            .map(|_| random.value())
            .collect(),
    };
    let mut back = Fp8Rows {
        columns,
        codes: vec![0xAA; weight.codes.len()],
        scales: vec![f32::NAN; weight.scales.len()],
    };
    for tile in tiles {
        unpack_fp8(&pack_fp8(&weight, tile).unwrap(), tile, &mut back).unwrap();
    }
    assert!(weight == back);
}

#[test]
fn unpacking_gives_back_every_byte() {
    for rows in [64, 70, 192] {
        fp4_round_trip(rows, 512, &plain_tiles(rows));
        fp8_round_trip(rows, 256, &plain_tiles(rows));
    }
    fp4_round_trip(512, 1024, &gate_up_tiles(256));
    fp8_round_trip(512, 512, &gate_up_tiles(256));
    // A fused QKV shard of MiMo-V2.5-Pro: 3392 rows, 26.5 scale groups.
    fp8_round_trip(3392, 256, &plain_tiles(3392));
}

#[test]
fn gate_and_up_rows_of_one_inner_column_meet_in_one_thread() {
    for (t, tile) in gate_up_tiles(64).iter().enumerate() {
        for r in (0..64).filter(|r| r % 16 < 8) {
            let gate = tile[r].unwrap();
            assert_eq!(tile[r + 8], Some(gate + 64));
            assert_eq!(gate, t * 32 + r / 16 * 8 + r % 8);
        }
    }
}

#[test]
fn shapes_that_do_not_fill_pages_are_refused() {
    let weight = Fp4Rows {
        columns: 640,
        codes: vec![],
        scales: vec![],
    };
    let message = pack_fp4(&weight, &plain_tiles(1)[0])
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("a multiple of 512") && message.contains("640"),
        "{message}"
    );
    let weight = Fp8Rows {
        columns: 256,
        codes: vec![0; 256 * 256],
        scales: vec![1.0; 4],
    };
    let mut tile = plain_tiles(1)[0];
    tile[1] = Some(200);
    assert!(pack_fp8(&weight, &tile).is_err());
}
