//! Markdown to HTML that is safe to show: pulldown-cmark parses, syntect colours code by class names,
//! ammonia lets through a short list of elements.
//!
//! Invariant: whatever a model writes, what comes out has no script, no style, no handler, and no
//! link but http, https and mailto. Raw HTML in the text is shown as text.

use pulldown_cmark::{CodeBlockKind, CowStr, Event, Options, Parser, Tag, TagEnd, html};
use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;
use syntect::html::{ClassStyle, ClassedHTMLGenerator};
use syntect::parsing::SyntaxSet;
use syntect::util::LinesWithEndings;

/// Code above this is shown without colours: a model can write a lot.
const COLOURED_BYTES_MAX: usize = 64 << 10;
/// What class names of coloured code begin with.
const CLASS_PREFIX: &str = "s-";

fn syntaxes() -> &'static SyntaxSet {
    static SET: OnceLock<SyntaxSet> = OnceLock::new();
    SET.get_or_init(SyntaxSet::load_defaults_newlines)
}

/// HTML of a whole block of Markdown.
pub(crate) fn render(text: &str) -> String {
    let options =
        Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TASKLISTS;
    let mut events: Vec<Event<'_>> = Vec::new();
    let mut code: Option<(String, String)> = None;
    for event in Parser::new_ext(text, options) {
        match (event, &mut code) {
            (Event::Start(Tag::CodeBlock(kind)), _) => {
                code = Some((language(&kind), String::new()));
            }
            (Event::Text(text), Some((_, body))) => body.push_str(&text),
            (Event::End(TagEnd::CodeBlock), slot) => {
                if let Some((language, body)) = slot.take() {
                    events.push(Event::Html(code_block(&language, &body)));
                }
            }
            // Raw HTML is text here.
            (Event::Html(raw) | Event::InlineHtml(raw), _) => events.push(Event::Text(raw)),
            (event, _) => events.push(event),
        }
    }
    let mut out = String::with_capacity(text.len() * 2);
    html::push_html(&mut out, events.into_iter());
    sanitise(&out)
}

fn language(kind: &CodeBlockKind<'_>) -> String {
    match kind {
        CodeBlockKind::Fenced(info) => info.split_whitespace().next().unwrap_or("").to_owned(),
        CodeBlockKind::Indented => String::new(),
    }
}

fn code_block(language: &str, body: &str) -> CowStr<'static> {
    let label: String = language
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "+#-_.".contains(*c))
        .take(32)
        .collect();
    let inner = coloured(&label, body).unwrap_or_else(|| escape(body));
    format!("<pre class=\"code\"><code class=\"language-{label}\">{inner}</code></pre>").into()
}

fn coloured(language: &str, body: &str) -> Option<String> {
    if body.len() > COLOURED_BYTES_MAX {
        return None;
    }
    let set = syntaxes();
    let syntax = set.find_syntax_by_token(language)?;
    let style = ClassStyle::SpacedPrefixed {
        prefix: CLASS_PREFIX,
    };
    let mut generator = ClassedHTMLGenerator::new_with_class_style(syntax, set, style);
    for line in LinesWithEndings::from(body) {
        generator
            .parse_html_for_line_which_includes_newline(line)
            .ok()?;
    }
    Some(generator.finalize())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn sanitise(html: &str) -> String {
    static RULES: OnceLock<ammonia::Builder<'static>> = OnceLock::new();
    let rules = RULES.get_or_init(|| {
        let tags: HashSet<&str> = [
            "p",
            "br",
            "hr",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "ul",
            "ol",
            "li",
            "blockquote",
            "pre",
            "code",
            "span",
            "em",
            "strong",
            "del",
            "a",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
        ]
        .into();
        let attributes: HashMap<&str, HashSet<&str>> = [
            ("a", ["href", "title"].into()),
            ("ol", ["start"].into()),
            ("pre", ["class"].into()),
            ("code", ["class"].into()),
            ("span", ["class"].into()),
        ]
        .into();
        let mut builder = ammonia::Builder::new();
        builder
            .tags(tags)
            .generic_attributes(HashSet::new())
            .tag_attributes(attributes)
            .url_schemes(["http", "https", "mailto"].into())
            .link_rel(Some("noopener noreferrer nofollow"));
        builder
    });
    rules.clean(html).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn code_is_coloured_by_classes_only() {
        let html = render("```rust\nfn main() { let x = \"<b>\"; }\n```");
        assert!(html.contains("class=\"language-rust\""), "{html}");
        assert!(html.contains("class=\"s-"), "{html}");
        assert!(
            html.contains("&lt;b&gt;") && !html.contains("style="),
            "{html}"
        );
    }

    #[test]
    fn nothing_active_comes_through() {
        let attacks = [
            "<script>alert(1)</script>",
            "<img src=x onerror=alert(1)>",
            "[x](javascript:alert(1))",
            "[x](data:text/html,<script>1</script>)",
            "<a href='javascript:1' onclick=1>x</a>",
            "```x\" onload=\"1\n</code></pre><script>1</script>\n```",
            "<iframe src='https://example.org'></iframe>",
            "![x](https://example.org/track.png)",
        ];
        for attack in attacks {
            let html = render(attack);
            let active = [
                "<script",
                "<img",
                "<iframe",
                "onerror=\"",
                "href=\"javascript",
                "href=\"data",
            ];
            assert!(active.iter().all(|a| !html.contains(a)), "{attack}: {html}");
        }
    }

    #[test]
    fn tables_lists_and_emphasis() {
        let html = render("| a | b |\n|---|---|\n| 1 | 2 |\n\n- **x** ~~y~~\n");
        for part in [
            "<table>",
            "<td>2</td>",
            "<strong>x</strong>",
            "<del>y</del>",
        ] {
            assert!(html.contains(part), "{part}: {html}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_safe(text in "[<>\"'`a-z/=:&;#()\\[\\]!\n -]{0,200}") {
            let html = render(&text);
            prop_assert!(!html.contains("<script"));
            prop_assert!(!html.contains("javascript:") || !html.contains("href=\"javascript:"));
        }
    }
}
