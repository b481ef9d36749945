//! One source for bytes: the constants and `repr(C)` structs that host and kernels share, and the
//! header `kernels/layout.h` made from them.
//!
//! A test fails when the checked-in header differs from [`header`]; on a GPU the kernel
//! `resident_layout` reports the sizes that the device compiler gives (`tests/gpu`).
//! Invariant: every field is 8-byte pointers first, then 4-byte integers: no padding to disagree on.

use std::any::Any;
use std::fmt::Write;

/// Columns of a weight block.
pub const BLOCK_COLUMNS: usize = 128;
/// Rows of a step that share one product.
pub const TOKENS: usize = 8;

/// Warpgroups of the resident kernel that multiply: 12 warps, which 1 to 4 strips divide.
pub const GROUPS: usize = 3;
/// Ring stages of the resident kernel.
pub const RING_STAGES: usize = 4;
/// Bytes of a stage, at most: four strips of 6 MXFP4 blocks, of 3 FP8 ones, or of a BF16 one.
pub const PAGE_BYTES: usize = 26112;
/// Words that the kernel `resident_layout` writes.
pub const LAYOUT_WORDS: usize = 5;
/// Words of a CTA's `batons`: three of each thread.
pub const BATON_WORDS: usize = 3 * GROUPS * 128;
/// Pieces in which activations are copied to shared memory, each with a barrier.
pub const STAGE_PIECES: usize = 8;
/// Shared memory of the resident kernel before its activations, at most.
pub const RESIDENT_HEADER_BYTES: usize = RING_STAGES * PAGE_BYTES + 6400 + TOKENS * EXPERTS_MAX * 4;
/// Ranks that the kernel knows.
pub const RANKS_MAX: usize = 8;
/// Heads of a group that a CTA of attention takes where positions are shared (elsewhere 4).
pub const HEADS: usize = 16;
/// Columns of the values that a CTA of attention takes.
pub const VALUE_COLUMNS: usize = 128;
/// Positions of a tile of attention that a warp has.
pub const WARP_POSITIONS: usize = 16;
/// Distinct experts of a step, and rows times experts of a row.
pub const SLOTS_MAX: usize = 64;
/// Experts of a row.
pub const ACTIVE_MAX: usize = 8;
/// Experts of a layer.
pub const EXPERTS_MAX: usize = 512;
/// Weight formats of a strip (`kernels/strips.cuh`).
pub const STRIP_FP4: usize = 0;
/// FP8 E4M3 with f32 scales of 128 x 128.
pub const STRIP_FP8: usize = 1;
/// BF16.
pub const STRIP_BF16: usize = 2;
/// f32 as two BF16.
pub const STRIP_F32: usize = 3;
/// Instructions of the resident kernel; those from `CHOOSE` on are `draft_op` of `kernels/resident_draft.cuh`.
pub const OPS: [&str; 17] = [
    "EMBED",
    "QKV",
    "ATTENTION",
    "O_PROJ",
    "ALL_REDUCE",
    "ROUTER",
    "GATE_UP",
    "DOWN",
    "LM_HEAD",
    "FUSE",
    "CONTEXT_KV",
    "CHOOSE",
    "DRAFT_EMBED",
    "DRAFT_ATTENTION",
    "DRAFT_CHOOSE",
    "CONTEXT",
    "APPEND",
];
/// Passes of a step: what an instruction is part of ([`Instr::pass`]).
pub const PASSES: [&str; 3] = ["VERIFY", "DRAFT", "CONTEXT"];
/// Stop ids that a run knows.
pub const STOPS_MAX: usize = 8;
/// Why a run has ended ([`StepState::reason`]).
pub const REASONS: [&str; 5] = ["NONE", "STOP_ID", "COUNT", "CONTEXT", "HOST"];

/// Declares a struct once for Rust and for C.
macro_rules! shared {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $rust:ty = $c:literal,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $name { $($(#[$field_doc])* pub $field: $rust,)* }

        impl $name {
            /// Size and the offsets of the fields, bytes.
            #[must_use]
            pub fn layout() -> Vec<usize> {
                vec![size_of::<Self>(), $(std::mem::offset_of!(Self, $field),)*]
            }

            /// Fields that can be constants for a compiler, as C declares them: every `i32`, and addresses that are 0.
            #[must_use]
            pub fn constants(&self) -> Vec<(&'static str, i64)> {
                let all: Vec<(&'static str, &dyn Any)> = vec![$(($c, &self.$field),)*];
                let value = |field: &dyn Any| match field.downcast_ref::<i32>() {
                    Some(&v) => Some(i64::from(v)),
                    None => field.downcast_ref::<u64>().filter(|&&v| v == 0).map(|_| 0),
                };
                all.into_iter().filter_map(|(c, field)| Some((c, value(field)?))).collect()
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

shared!(
    /// One instruction of the resident kernel; what each field means to which op is said in
    /// `src/program.rs`. Pointers are device addresses, 0 where an op has none.
    Instr {
        /// Weight pages `[expert][tile][block][strip]`.
        pages: u64 = "const uint8_t* pages",
        /// What it reads: activations, or f32 rows.
        x: u64 = "const void* x",
        /// What it writes.
        out: u64 = "void* out",
        /// Sums of squares `[hidden / 32][8]` f32.
        squares: u64 = "void* squares",
        /// Norm weights of the next product, `[hidden_padded]` f32.
        weight: u64 = "const void* weight",
        /// Embedding rows, BF16 or f32.
        table: u64 = "const void* table",
        /// Residual stream `[8, hidden_padded]` f32.
        residual: u64 = "void* residual",
        /// Router logits `[parts][8][rows]` f32.
        logits: u64 = "const void* logits",
        /// Correction bias `[experts]` f32.
        bias: u64 = "const void* bias",
        /// Key cache `[kv_heads, context, qk_dim]` BF16.
        keys: u64 = "void* keys",
        /// Value cache `[kv_heads, context, v_dim]` BF16.
        values: u64 = "void* values",
        /// Sink logits `[heads]` f32.
        sinks: u64 = "const void* sinks",
        /// `[context, rope_dims / 2]` pairs (cos, sin) f32.
        turns: u64 = "const void* turns",
        /// `[CTAs, 8]` pairs (value, token).
        bests: u64 = "void* bests",
        /// Where this rank's part of the drafter's input goes as activations; 0: no tap.
        taps: u64 = "void* taps",
        /// Embedding of rows after the anchor, `[hidden_padded]` f32; 0: that of `first_token`.
        mask: u64 = "const void* mask",
        /// Norm of a query head `[qk_dim]` f32; 0: none.
        q_norm: u64 = "const void* q_norm",
        /// Norm of a key head.
        k_norm: u64 = "const void* k_norm",
        /// Which.
        op: i32 = "int op",
        /// Instruction whose counter is waited for; -1: none.
        wait: i32 = "int wait",
        /// Whether its activations are copied to shared memory.
        stage: i32 = "int stage",
        /// Weight format.
        format: i32 = "int format",
        /// Tiles of an expert.
        tiles: i32 = "int tiles",
        /// Strips of 16 rows of a tile.
        strips: i32 = "int strips",
        /// Blocks of 128 columns.
        blocks: i32 = "int blocks",
        /// Blocks of a page.
        page_blocks: i32 = "int page_blocks",
        /// Parts that K is cut into, each a unit of work of its own.
        parts: i32 = "int parts",
        /// Which sum over ranks of the step.
        index: i32 = "int index",
        /// Routed experts; 0: one dense unit.
        experts: i32 = "int experts",
        /// Experts of a row.
        active: i32 = "int active",
        /// Whether expert weights are divided by their sum.
        normalise: i32 = "int normalise",
        /// Width of the residual stream.
        hidden: i32 = "int hidden",
        /// The same, a multiple of 128.
        hidden_padded: i32 = "int hidden_padded",
        /// Rows of router logits.
        logit_rows: i32 = "int logit_rows",
        /// Parts of router logits to be added.
        logit_parts: i32 = "int logit_parts",
        /// Query heads of this rank.
        heads: i32 = "int heads",
        /// Key/value heads of this rank.
        kv_heads: i32 = "int kv_heads",
        /// Width of a key.
        qk_dim: i32 = "int qk_dim",
        /// Width of a value.
        v_dim: i32 = "int v_dim",
        /// Bytes of a cached key.
        key_stride: i32 = "int key_stride",
        /// Bytes of a cached value.
        value_stride: i32 = "int value_stride",
        /// Columns of a key that turn.
        rope_dims: i32 = "int rope_dims",
        /// Keys before its own that a query sees; -1: all.
        window: i32 = "int window",
        /// First key row of QKV.
        k_first: i32 = "int k_first",
        /// First value row of QKV.
        v_first: i32 = "int v_first",
        /// Rows of QKV.
        qkv_rows: i32 = "int qkv_rows",
        /// Columns of the attention output, a multiple of 128.
        columns_padded: i32 = "int columns_padded",
        /// Inner columns, a multiple of 128.
        inner_padded: i32 = "int inner_padded",
        /// Columns of Inner: one for each (row, expert), and a few that are read but not used.
        pair_columns: i32 = "int pair_columns",
        /// First token of this rank's vocabulary.
        first_token: i32 = "int first_token",
        /// Rows that are no padding.
        rows: i32 = "int rows",
        /// Bytes of activations that are copied to shared memory.
        stage_bytes: i32 = "int stage_bytes",
        /// Index into [`PASSES`].
        pass: i32 = "int pass",
        /// Keys after its own that a query of a block sees; -1: all of the block.
        ahead: i32 = "int ahead",
        /// Column of `taps` that the residual's first one is; negative where other ranks have it.
        tap_column: i32 = "int tap_column",
        /// Columns of `taps`, a multiple of 128.
        tap_columns: i32 = "int tap_columns",
        /// Draft layers whose context keys and values are appended.
        layers: i32 = "int layers",
        /// Of the norm.
        eps: f32 = "float eps",
        /// Of scores, or of expert weights.
        scaling: f32 = "float scaling",
        /// Of values.
        value_scale: f32 = "float value_scale",
        /// Unused: 16 bytes a copy of it.
        reserved: [i32; 2] = "int reserved[2]",
    }
);

shared!(
    /// What a step works on and leaves behind; device memory.
    StepState {
        /// Rows of the step, 1 to 8.
        rows: i32 = "int rows",
        /// Position of the first row.
        position: i32 = "int position",
        /// 0: stop after the step; 1: feed the choice back at the same position; 2: and move on.
        chain: i32 = "int chain",
        /// Drafted tokens that were right.
        accepted: i32 = "int accepted",
        /// Tokens of the rows.
        tokens: [i32; 8] = "int tokens[8]",
        /// The choice after each row.
        best: [i32; 8] = "int best[8]",
        /// Distinct experts, summed over layers and steps.
        distinct: u32 = "uint32_t distinct",
        /// Routed layers in that sum.
        routed: u32 = "uint32_t routed",
        /// Rows of the drafter's block in this step, the anchor included.
        block: i32 = "int block",
        /// The drafter's whole block.
        block_max: i32 = "int block_max",
        /// Rows of a verify step where nothing makes it shorter.
        width: i32 = "int width",
        /// Tokens that a sequence may have.
        limit: i32 = "int limit",
        /// Rows of the last step that are part of the text, and where the first one stands.
        committed: i32 = "int committed",
        /// See `committed`.
        committed_position: i32 = "int committed_position",
        /// Whether a run goes on.
        running: i32 = "int running",
        /// Why it does not: index into [`REASONS`].
        reason: i32 = "int reason",
        /// Steps of this launch.
        steps: i32 = "int steps",
        /// Tokens that the run may still give.
        left: i32 = "int left",
        /// Benchmarks: take that many drafts, less one, as right; 0: ask the target.
        simulate: i32 = "int simulate",
        /// Stop ids in `stops`.
        stop_count: i32 = "int stop_count",
        /// Tokens that end a run.
        stops: [i32; 8] = "int stops[8]",
        /// Tokens put into the ring since its beginning.
        produced: u32 = "uint32_t produced",
        /// Drafted tokens of the run, and how many of them were kept.
        drafted: u32 = "uint32_t drafted",
        /// See `drafted`.
        kept: u32 = "uint32_t kept",
        /// Unused.
        reserved: u32 = "uint32_t reserved",
    }
);

shared!(
    /// What the host tells a run; host memory, read together once a step.
    HostWords {
        /// Tokens taken out of the ring since its beginning.
        taken: u32 = "uint32_t taken",
        /// 1: end after this step.
        stop: u32 = "uint32_t stop",
    }
);

shared!(
    /// Arguments of `kernels/resident.cuh`.
    StepArgs {
        /// `[instructions]`.
        program: u64 = "const Instr* program",
        /// `[instructions]` u32, never reset.
        counters: u64 = "uint32_t* counters",
        /// The step.
        state: u64 = "StepState* state",
        /// `[CTAs, instructions, 3]` cycle stamps of the last step, or 0.
        stamps: u64 = "long long* stamps",
        /// Fault record in host memory, or 0.
        fault: u64 = "dev::Fault* fault",
        /// Inbox of every rank.
        inbox: [u64; 8] = "dev::Word* inbox[8]",
        /// Where every rank's choice goes.
        choice: [u64; 8] = "dev::Word* choice[8]",
        /// Tokens for the host, in its memory; 0: none.
        ring: u64 = "dev::Word* ring",
        /// What the host says, in its memory.
        host: u64 = "const HostWords* host",
        /// `[CTAs, warps, 3, 32]`: sums that a CTA hands to the one after it, in the middle of a tile of gate and up.
        batons: u64 = "dev::Word* batons",
        /// Length of the program.
        instructions: i32 = "int instructions",
        /// Ranks.
        ranks: i32 = "int ranks",
        /// This rank.
        rank: i32 = "int rank",
        /// Words of an inbox from one rank and of one half.
        words: i32 = "int words",
        /// Steps that were run before with these counters.
        first_step: i32 = "int first_step",
        /// Steps to run.
        steps: i32 = "int steps",
        /// Sums over ranks of a step, the choice included.
        sums: i32 = "int sums",
        /// Bytes of shared memory for activations.
        x_bytes: i32 = "int x_bytes",
        /// Positions of the caches.
        context: i32 = "int context",
        /// First instruction that is executed; those before are only counted.
        begin: i32 = "int begin",
        /// One past the last that is executed.
        end: i32 = "int end",
        /// Words of `ring`, a power of two.
        ring_words: i32 = "int ring_words",
    }
);

/// What a wait was for when it ran out of time: `dev::Fault` of `kernels/dev.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultRecord {
    /// Whether there is one.
    pub set: u32,
    /// 1: a barrier of the ring; 2: a word of another rank; 3: a counter; 4: the host.
    pub what: u32,
    /// CTA.
    pub cta: u32,
    /// Thread.
    pub thread: u32,
    /// Index into the program.
    pub instruction: u32,
    /// Step of the launch.
    pub step: u32,
    /// Fill, tag or count that was waited for.
    pub wanted: u64,
    /// What was there; of a barrier its state as the hardware keeps it.
    pub seen: u64,
    /// Address of the word or counter; of a barrier its offset in shared memory.
    pub at: u64,
}

/// The header that the kernels include.
#[must_use]
pub fn header() -> String {
    let mut out = String::from(
        "// Made by src/layout.rs (its test writes it anew when KILOTOK_BLESS=1). Do not edit.\n#pragma once\n#include \"dev.cuh\"\n",
    );
    for (name, value) in [
        ("BLOCK_COLUMNS", BLOCK_COLUMNS),
        ("TOKENS", TOKENS),
        ("GROUPS", GROUPS),
        ("RING_STAGES", RING_STAGES),
        ("PAGE_BYTES", PAGE_BYTES),
        ("BATON_WORDS", BATON_WORDS),
        ("STAGE_PIECES", STAGE_PIECES),
        ("RESIDENT_HEADER_BYTES", RESIDENT_HEADER_BYTES),
        ("RANKS_MAX", RANKS_MAX),
        ("HEADS", HEADS),
        ("VALUE_COLUMNS", VALUE_COLUMNS),
        ("WARP_POSITIONS", WARP_POSITIONS),
        ("SLOTS_MAX", SLOTS_MAX),
        ("ACTIVE_MAX", ACTIVE_MAX),
        ("EXPERTS_MAX", EXPERTS_MAX),
        ("STRIP_FP4", STRIP_FP4),
        ("STRIP_FP8", STRIP_FP8),
        ("STRIP_BF16", STRIP_BF16),
        ("STRIP_F32", STRIP_F32),
    ] {
        let _ = writeln!(out, "static const int {name} = {value};");
    }
    out.push_str(&OpArgs::c());
    for (value, op) in OPS.iter().enumerate() {
        let _ = writeln!(out, "static const int DO_{op} = {value};");
    }
    for (value, pass) in PASSES.iter().enumerate() {
        let _ = writeln!(out, "static const int PASS_{pass} = {value};");
    }
    for (value, reason) in REASONS.iter().enumerate() {
        let _ = writeln!(out, "static const int END_{reason} = {value};");
    }
    out.push_str(&Instr::c());
    out.push_str(&StepState::c());
    out.push_str(&HostWords::c());
    out.push_str(&StepArgs::c());
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
        assert_eq!(OpArgs::layout(), [112, 0, 64, 68, 100]);
        assert_eq!(size_of::<Instr>(), 18 * 8 + 44 * 4);
        assert_eq!(size_of::<Instr>() % 16, 0, "copied by 16 bytes");
        assert_eq!(size_of::<StepState>(), 46 * 4);
        assert_eq!(size_of::<StepArgs>(), 24 * 8 + 12 * 4);
        assert_eq!(size_of::<FaultRecord>(), 48);
    }
}
