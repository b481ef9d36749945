//! What the compiler may know of a model: `kernels/shapes.h` with its constants.
//!
//! Sizes that all instructions of one kind have in common become constants there, each hiding the field of the same
//! name: divisions become multiplications, loops have known ends, formats and passes that the model has not got
//! are no code. What differs from layer to layer stays a field. Invariant: every product of the program is of
//! exactly one kind.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::layout::{Instr, OPS, PASSES};
use crate::program::Program;

/// A kind of instruction: its type in the header, pass (none: any), op, whether its experts are routed (of products).
struct Kind {
    name: &'static str,
    pass: Option<&'static str>,
    op: &'static str,
    routed: Option<bool>,
}

const fn kind(
    name: &'static str,
    pass: Option<&'static str>,
    op: &'static str,
    routed: Option<bool>,
) -> Kind {
    Kind {
        name,
        pass,
        op,
        routed,
    }
}

/// Ops that are no products, which the kernels name.
const SMALL: [Kind; 4] = [
    kind("AllReduceInstr", None, "ALL_REDUCE", None),
    kind("AttentionInstr", None, "ATTENTION", None),
    kind("DraftAttentionInstr", None, "DRAFT_ATTENTION", None),
    kind("AppendInstr", None, "APPEND", None),
];

const VERIFY: Option<&str> = Some("VERIFY");
const DRAFT: Option<&str> = Some("DRAFT");
const PLAIN: Option<bool> = Some(false);
const PRODUCTS: [Kind; 14] = [
    kind("QkvInstr", VERIFY, "QKV", PLAIN),
    kind("OProjInstr", VERIFY, "O_PROJ", PLAIN),
    kind("RouterInstr", None, "ROUTER", PLAIN),
    kind("RoutedGateUpInstr", None, "GATE_UP", Some(true)),
    kind("RoutedDownInstr", None, "DOWN", Some(true)),
    kind("DenseGateUpInstr", VERIFY, "GATE_UP", PLAIN),
    kind("DenseDownInstr", VERIFY, "DOWN", PLAIN),
    kind("LmHeadInstr", None, "LM_HEAD", PLAIN),
    kind("DraftQkvInstr", DRAFT, "QKV", PLAIN),
    kind("DraftOProjInstr", DRAFT, "O_PROJ", PLAIN),
    kind("DraftGateUpInstr", DRAFT, "GATE_UP", PLAIN),
    kind("DraftDownInstr", DRAFT, "DOWN", PLAIN),
    kind("FuseInstr", None, "FUSE", PLAIN),
    kind("ContextKvInstr", None, "CONTEXT_KV", PLAIN),
];

impl Kind {
    fn has(&self, i: &Instr) -> bool {
        OPS[i.op as usize] == self.op
            && self.pass.is_none_or(|p| PASSES[i.pass as usize] == p)
            && self.routed.is_none_or(|routed| (i.experts > 0) == routed)
    }

    /// The type: an instruction whose common fields are constants.
    fn write(&self, program: &Program, out: &mut String) {
        let all: Vec<&Instr> = (program.instructions.iter())
            .filter(|i| self.has(i))
            .collect();
        let _ = write!(out, "struct {} : Instr {{", self.name);
        for (declaration, value) in common(&all) {
            let _ = write!(out, " static constexpr {declaration} = {value};");
        }
        out.push_str(" };\n");
    }
}

/// What an image says of the shapes that it was compiled for; never 0, which says that it is for every model.
#[must_use]
pub fn fingerprint(program: &Program) -> u64 {
    let mut hasher = DefaultHasher::new();
    constants(program).hash(&mut hasher);
    hasher.finish() | 1
}

/// The header of `program`'s shapes.
#[must_use]
pub fn header(program: &Program) -> String {
    format!(
        "// One model's shapes, made by src/shapes.rs.\n#pragma once\n#define SHAPES_KNOWN {:#x}ull\n{}",
        fingerprint(program),
        constants(program)
    )
}

fn constants(program: &Program) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "#define SHAPE_RANKS {}", program.ranks);
    let _ = writeln!(out, "#define SHAPE_CTAS {}", program.ctas);
    let _ = writeln!(out, "#define SHAPE_X_BYTES {}", program.x_bytes);
    if program.block > 0 {
        out.push_str("#define SHAPES_DRAFT 1\n");
    }
    out.push_str("#include \"layout.h\"\n");
    let present = |kind: &&Kind| program.instructions.iter().any(|i| kind.has(i));
    let products: Vec<&Kind> = PRODUCTS.iter().filter(present).collect();
    for kind in SMALL.iter().chain(products.iter().copied()) {
        kind.write(program, &mut out);
    }
    // The kernels name this one: it is there without any expert too.
    let routed = "RoutedGateUpInstr";
    if !products.iter().any(|kind| kind.name == routed) {
        let _ = writeln!(out, "typedef Instr {routed};");
    }
    out.push_str("#define SHAPES_PRODUCTS(X)");
    for kind in products {
        let pass = kind.pass.map_or("-1".into(), |p| format!("PASS_{p}"));
        let (name, op, routed) = (kind.name, kind.op, kind.routed == Some(true));
        let _ = write!(out, " X({name}, {pass}, DO_{op}, {routed})");
    }
    out.push('\n');
    out
}

/// What differs by its nature, also where a kind has one instruction, or from rank to rank.
const NEVER: [&str; 3] = ["int wait", "int index", "int first_token"];

/// Integer fields that have the same value in all of them, and addresses that none of them has.
fn common(all: &[&Instr]) -> Vec<(&'static str, i64)> {
    let Some((first, rest)) = all.split_first() else {
        return Vec::new();
    };
    let mut fields = first.constants();
    fields.retain(|(declaration, _)| !NEVER.contains(declaration));
    for i in rest {
        let others = i.constants();
        fields.retain(|field| others.contains(field));
    }
    fields
}
