//! The shape of source files: length of files and functions, the header, `unsafe`, and words that do
//! not belong in finished code.
//!
//! Lengths do not count tests. Device code (`.cu`, `.cuh`) is checked for length and header only.

use std::path::Path;

use anyhow::Result;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use super::{Findings, files};

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;
/// Nine of ten functions are at most this long.
const FUNCTION_LINES_USUAL: usize = 30;
/// A device file beyond the limit says this, and why.
const EXCUSE: &str = "Longer than 500 lines because";
/// Where `unsafe` may stand: device crates, and the one file that maps checkpoints.
const UNSAFE_ALLOWED: [&str; 3] = ["crates/cpu/", "crates/cuda/", "crates/model/src/mapped.rs"];
/// Lines above an `unsafe` in which its SAFETY comment stands.
const SAFETY_WITHIN: usize = 12;

/// Names that say nothing about what is inside.
pub(super) fn is_vague(name: &str) -> bool {
    ["utils", "util", "common", "core", "helpers", "misc"].contains(&name)
}

/// Checks every source file; returns a line of figures.
pub(super) fn check(root: &Path, findings: &mut Findings<'_>) -> Result<String> {
    let mut lengths = Vec::new();
    for path in files(&root.join("crates"), &["rs", "cu", "cuh"])? {
        let text = std::fs::read_to_string(&path)?;
        let stem = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default();
        if is_vague(stem) {
            findings.add(&path, 1, "a module needs a noun, not this name");
        }
        if path.extension().is_some_and(|ending| ending == "rs") {
            rust(root, &path, &text, &mut lengths, findings);
        } else {
            device(&path, &text, findings);
        }
    }
    Ok(share_of_short(root, &mut lengths, findings))
}

/// Checks that most functions are short; names the ones that are nearest to it.
fn share_of_short(
    root: &Path,
    lengths: &mut [(usize, String)],
    findings: &mut Findings<'_>,
) -> String {
    lengths.sort();
    let usual = lengths.partition_point(|(length, _)| *length <= FUNCTION_LINES_USUAL);
    let percent = usual as f64 * 100.0 / lengths.len().max(1) as f64;
    let summary = format!(
        "{} functions, {percent:.1} % of at most {FUNCTION_LINES_USUAL} lines",
        lengths.len()
    );
    if percent < 90.0 {
        let next: Vec<String> = lengths[usual..]
            .iter()
            .take(12)
            .map(|(length, name)| format!("{name} ({length})"))
            .collect();
        let message = format!(
            "{summary}, not 90 %; the shortest longer ones: {}",
            next.join(", ")
        );
        findings.add(&root.join("crates"), 1, message);
    }
    summary
}

fn device(path: &Path, text: &str, findings: &mut Findings<'_>) {
    if !text.starts_with("//") {
        findings.add(path, 1, "the file does not open with what it owns");
    }
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX && !text.contains(EXCUSE) {
        findings.add(
            path,
            1,
            format!("{lines} lines, and no line `{EXCUSE} ...`"),
        );
    }
}

fn rust(
    root: &Path,
    path: &Path,
    text: &str,
    lengths: &mut Vec<(usize, String)>,
    findings: &mut Findings<'_>,
) {
    let name = path
        .strip_prefix(root)
        .unwrap_or(path)
        .to_string_lossy()
        .into_owned();
    let is_test =
        name.contains("/tests/") || name.ends_with("/tests.rs") || name.contains("/benches/");
    if !is_test && !text.starts_with("//!") {
        findings.add(path, 1, "the file does not open with what it owns (`//!`)");
    }
    let file = match syn::parse_file(text) {
        Ok(file) => file,
        Err(error) => {
            return findings.add(
                path,
                error.span().start().line,
                format!("cannot parse: {error}"),
            );
        }
    };
    let mut visitor = Visitor {
        path,
        lines: text.lines().collect(),
        unsafe_allowed: UNSAFE_ALLOWED.iter().any(|place| name.starts_with(place)),
        in_test: is_test,
        test_lines: 0,
        lengths,
        findings,
    };
    visitor.visit_file(&file);
    let lines = text.lines().count() - visitor.test_lines;
    if !is_test && lines > FILE_LINES_MAX {
        findings.add(
            path,
            1,
            format!("{lines} lines without tests, at most {FILE_LINES_MAX}"),
        );
    }
}

struct Visitor<'a, 'b> {
    path: &'a Path,
    lines: Vec<&'a str>,
    unsafe_allowed: bool,
    in_test: bool,
    test_lines: usize,
    lengths: &'a mut Vec<(usize, String)>,
    findings: &'a mut Findings<'b>,
}

impl Visitor<'_, '_> {
    fn function(&mut self, name: &syn::Ident, block: &syn::Block) {
        let span = block.span();
        let length = span.end().line - name.span().start().line + 1;
        if self.in_test {
            return;
        }
        let file = self.path.file_name().unwrap_or_default().to_string_lossy();
        self.lengths.push((length, format!("{file} {name}")));
        if length > FUNCTION_LINES_MAX {
            let message = format!("`{name}` has {length} lines, at most {FUNCTION_LINES_MAX}");
            self.findings
                .add(self.path, name.span().start().line, message);
        }
    }

    fn check_unsafe(&mut self, line: usize) {
        if !self.unsafe_allowed {
            self.findings.add(
                self.path,
                line,
                "`unsafe` outside cpu, cuda and model/src/mapped.rs",
            );
        }
        let from = line.saturating_sub(SAFETY_WITHIN + 1);
        let above = &self.lines[from..line.min(self.lines.len())];
        if !above
            .iter()
            .any(|line| line.contains("SAFETY") || line.contains("# Safety"))
        {
            self.findings
                .add(self.path, line, "`unsafe` without a SAFETY line above it");
        }
    }
}

impl<'ast> Visit<'ast> for Visitor<'_, '_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        let is_test = module.attrs.iter().any(is_cfg_test);
        if !is_test || self.in_test {
            return visit::visit_item_mod(self, module);
        }
        let span = module.span();
        self.test_lines += span.end().line - span.start().line + 1;
        self.in_test = true;
        visit::visit_item_mod(self, module);
        self.in_test = false;
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.function(&function.sig.ident, &function.block);
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.function(&function.sig.ident, &function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        if signature.unsafety.is_some() {
            self.check_unsafe(signature.span().start().line);
        }
        visit::visit_signature(self, signature);
    }

    fn visit_expr_unsafe(&mut self, block: &'ast syn::ExprUnsafe) {
        self.check_unsafe(block.span().start().line);
        visit::visit_expr_unsafe(self, block);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if item.unsafety.is_some() {
            self.check_unsafe(item.span().start().line);
        }
        visit::visit_item_impl(self, item);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let name = call
            .path
            .segments
            .last()
            .map(|segment| segment.ident.to_string())
            .unwrap_or_default();
        if ["todo", "unimplemented", "dbg"].contains(&name.as_str()) {
            self.findings.add(
                self.path,
                call.span().start().line,
                format!("`{name}!` in finished code"),
            );
        }
        visit::visit_macro(self, call);
    }

    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        // What needs a GPU is no test of this machine: it says so, and `-- --ignored` runs it where there is one.
        let needs_gpu = matches!(&attribute.meta, syn::Meta::NameValue(named)
            if matches!(&named.value, syn::Expr::Lit(why)
                if matches!(&why.lit, syn::Lit::Str(text) if text.value() == "needs a GPU")));
        if attribute.path().is_ident("ignore")
            && !(needs_gpu && self.path.to_string_lossy().contains("/tests/gpu/"))
        {
            self.findings
                .add(self.path, attribute.span().start().line, "a skipped test");
        }
        visit::visit_attribute(self, attribute);
    }
}

fn is_cfg_test(attribute: &syn::Attribute) -> bool {
    let is_test = || {
        attribute
            .parse_args::<syn::Path>()
            .is_ok_and(|path| path.is_ident("test"))
    };
    attribute.path().is_ident("cfg") && is_test()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(name: &str, text: &str) -> Vec<String> {
        let root = Path::new("/r");
        let mut findings = Findings {
            root,
            list: Vec::new(),
        };
        rust(root, &root.join(name), text, &mut Vec::new(), &mut findings);
        findings.list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_rule_is_found() {
        let long = format!("//! x\nfn f() {{\n{}}}\n", "    g();\n".repeat(70));
        let big = format!("//! x\n{}", "const A: u8 = 1;\n".repeat(500));
        for (name, text, wanted) in [
            ("crates/a/src/b.rs", "fn f() {}\n", "does not open"),
            ("crates/a/src/b.rs", long.as_str(), "`f` has 72 lines"),
            ("crates/a/src/b.rs", big.as_str(), "501 lines without tests"),
            (
                "crates/a/src/b.rs",
                "//! x\nfn f() { todo!() }\n",
                "`todo!` in finished code",
            ),
            (
                "crates/a/src/b.rs",
                "//! x\n// SAFETY: x\nunsafe fn f() {}\n",
                "`unsafe` outside",
            ),
            (
                "crates/cpu/src/b.rs",
                "//! x\nfn f() { unsafe { g() } }\n",
                "without a SAFETY line",
            ),
            (
                "crates/a/tests/b.rs",
                "#[test]\n#[ignore]\nfn f() {}\n",
                "a skipped test",
            ),
            (
                "crates/a/tests/gpu/b.rs",
                "#[test]\n#[ignore = \"slow\"]\nfn f() {}\n",
                "a skipped test",
            ),
        ] {
            let found = findings(name, text);
            assert!(
                found.len() == 1 && found[0].contains(wanted),
                "{wanted}: {found:?}"
            );
        }
    }

    #[test]
    fn tests_do_not_count() {
        let tests = "    fn g() {}\n".repeat(600);
        let text = format!("//! x\n#[cfg(test)]\nmod tests {{\n{tests}}}\n");
        assert!(findings("crates/a/src/b.rs", &text).is_empty());
    }
}
