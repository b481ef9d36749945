//! One source for bytes: the constants and `repr(C)` structs that host and kernels share, and the
//! header `kernels/layout.h` made from them.
//!
//! A test fails when the checked-in header differs from [`header`]; on a GPU the test kernel
//! `linear_layout` reports the sizes and offsets that the device compiler gives.
//! Invariant: every field is 8-byte pointers first, then 4-byte integers: no padding to disagree on.

use std::fmt::Write;

/// Rows of a weight block: what one warpgroup multiplies at once.
pub const BLOCK_ROWS: usize = 64;
/// Columns of a weight block.
pub const BLOCK_COLUMNS: usize = 128;
/// Bytes of an MXFP4 block: 4096 of codes, 256 of E8M0 scales.
pub const FP4_BLOCK_BYTES: usize = 4352;
/// MXFP4 blocks in a page: 64 rows x 512 columns, 17 KiB.
pub const FP4_BLOCKS_PER_PAGE: usize = 4;
/// Bytes of an FP8 block: 8192 of codes, two f32 scales, 8 unused.
pub const FP8_BLOCK_BYTES: usize = 8208;
/// FP8 blocks in a page: 64 rows x 256 columns, 16 KiB.
pub const FP8_BLOCKS_PER_PAGE: usize = 2;
/// Ring stages of a warpgroup in the test and bench kernels of `linear.cuh`.
pub const LINEAR_STAGES: usize = 3;
/// Pages that the loader of `linear.cuh` keeps in flight; 0: as many as the ring holds, because a
/// lone product has no small words to wait for.
pub const LINEAR_WINDOW: usize = 0;
/// Rows of a step that share one product.
pub const TOKENS: usize = 8;

/// Declares a struct once for Rust and for C.
macro_rules! shared {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $rust:ty = $c:literal,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $name { $($(#[$field_doc])* pub $field: $rust,)* }

        impl $name {
            /// Size and the offsets of the fields, bytes, as the kernel `linear_layout` reports them.
            #[must_use]
            pub fn layout() -> Vec<usize> {
                vec![size_of::<Self>(), $(std::mem::offset_of!(Self, $field),)*]
            }

            fn c() -> String {
                let mut out = format!("struct {} {{ ", stringify!($name));
                $(let _ = write!(out, "{}; ", $c);)*
                out.push_str("};\n");
                out
            }
        }
    };
}

shared!(
    /// Arguments of `linear.cuh`. Pointers are device addresses.
    LinearArgs {
        /// `[tiles][k / columns of a page][page]`.
        weights: u64 = "const uint8_t* weights",
        /// `[8, k]` f32.
        x: u64 = "const float* x",
        /// `[tiles * 64, 8]` f32, rows in fragment order.
        out: u64 = "float* out",
        /// Tiles of 64 rows.
        tiles: i32 = "int tiles",
        /// Columns.
        k: i32 = "int k",
    }
);

shared!(
    /// Arguments of the thin kernel around the small ops (`kernels/ops.cuh`). What each slot means is
    /// said there, op by op.
    OpArgs {
        /// Buffers.
        p: [u64; 8] = "void* p[8]",
        /// Which op.
        op: i32 = "int op",
        /// Sizes.
        n: [i32; 8] = "int n[8]",
        /// Numbers.
        f: [f32; 3] = "float f[3]",
    }
);

/// The header that the kernels include.
#[must_use]
pub fn header() -> String {
    let mut out = String::from(
        "// Made by src/layout.rs (its test writes it anew when KILOTOK_BLESS=1). Do not edit.\n#pragma once\n#include \"dev.cuh\"\n",
    );
    for (name, value) in [
        ("BLOCK_ROWS", BLOCK_ROWS),
        ("BLOCK_COLUMNS", BLOCK_COLUMNS),
        ("FP4_BLOCK_BYTES", FP4_BLOCK_BYTES),
        ("FP4_BLOCKS_PER_PAGE", FP4_BLOCKS_PER_PAGE),
        ("FP8_BLOCK_BYTES", FP8_BLOCK_BYTES),
        ("FP8_BLOCKS_PER_PAGE", FP8_BLOCKS_PER_PAGE),
        ("LINEAR_STAGES", LINEAR_STAGES),
        ("LINEAR_WINDOW", LINEAR_WINDOW),
        ("TOKENS", TOKENS),
    ] {
        let _ = writeln!(out, "static const int {name} = {value};");
    }
    out.push_str(&LinearArgs::c());
    out.push_str(&OpArgs::c());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checked_in_header_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/layout.h");
        if std::env::var_os("KILOTOK_BLESS").is_some() {
            std::fs::write(path, header()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), header());
    }

    #[test]
    fn structs_have_no_padding() {
        assert_eq!(LinearArgs::layout(), [32, 0, 8, 16, 24, 28]);
        assert_eq!(OpArgs::layout(), [112, 0, 64, 68, 100]);
    }
}
