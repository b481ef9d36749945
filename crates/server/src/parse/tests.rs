use super::*;
use proptest::prelude::*;
use serde_json::json;

fn weather() -> Vec<Value> {
    vec![
        json!({"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"},
            "exact": {"type": "boolean"}, "tags": {"type": "array"}}}}}),
    ]
}

fn expect(thinking: bool) -> Expect {
    Expect {
        thinking,
        tools: true,
        reasoning: true,
        schemas: weather(),
    }
}

fn whole(format: Format, thinking: bool, text: &str) -> Vec<Part> {
    pieces(format, thinking, &[text])
}

fn pieces(format: Format, thinking: bool, texts: &[&str]) -> Vec<Part> {
    let mut parser = Parser::new(format, expect(thinking));
    let mut out = Vec::new();
    texts.iter().for_each(|text| parser.push(text, &mut out));
    parser.finish(true, &mut out);
    join(out)
}

fn call(index: u32, name: &str, text: &str) -> [Part; 2] {
    let (name, text) = (name.to_owned(), text.to_owned());
    [Part::Call { index, name }, Part::Arguments { index, text }]
}

const MIMO: &str = "<think>It asks for\nweather.</think>\n\nI look.\n<tool_call>\n<function=weather>\n\
<parameter=city>Z&uuml;rich &amp; \"Köln\"\n</parameter>\n<parameter=days>3</parameter>\n\
<parameter=exact>True</parameter>\n<parameter=tags>[1, \"b\"]</parameter>\n</function>\n</tool_call>\n\
<tool_call>\n<function=weather>\n<parameter=city>null</parameter></function></tool_call>";

#[test]
fn mimo_calls_are_typed_by_their_schema() {
    let parts = whole(Format::Mimo, false, MIMO);
    assert_eq!(parts[0], Part::Reasoning("It asks for\nweather.".into()));
    assert_eq!(parts[1], Part::Content("I look.".into()));
    let first =
        r#"{"city": "Z&uuml;rich & \"Köln\"\n", "days": 3, "exact": true, "tags": [1,"b"]}"#;
    assert_eq!(parts[2..4], call(0, "weather", first));
    assert_eq!(parts[4..6], call(1, "weather", r#"{"city": null}"#));
    assert_eq!(parts.len(), 6);
}

const HERMES: &str = "Sure.\n\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"a } \\\" b\", \
\"o\": {\"x\": [1]}}}\n</tool_call>\n<tool_call>{\"arguments\": {\"days\": 2}, \"name\": \"weather\"}</tool_call>\
<tool_call>nonsense</tool_call>";

#[test]
fn json_calls_in_either_order_and_nonsense_as_text() {
    let parts = whole(Format::Hermes, false, HERMES);
    assert_eq!(parts[0], Part::Content("Sure.".into()));
    let first = "{\"city\": \"a } \\\" b\", \"o\": {\"x\": [1]}}";
    assert_eq!(parts[1..3], call(0, "weather", first));
    assert_eq!(parts[3..5], call(1, "weather", r#"{"days":2}"#));
    let rest = Part::Content("<tool_call>nonsense</tool_call>".into());
    assert_eq!(parts[5..], [rest]);
}

const HARMONY: &str = "<|channel|>analysis<|message|>Need <x> data.<|end|><|start|>assistant\
<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\":\"A\"}<|call|>\
<|start|>assistant<|channel|>final<|message|>Done.<|return|>";

#[test]
fn channels_become_parts() {
    let parts = whole(Format::Harmony, false, HARMONY);
    assert_eq!(parts[0], Part::Reasoning("Need <x> data.".into()));
    assert_eq!(parts[1..3], call(0, "weather", "{\"city\":\"A\"}"));
    assert_eq!(parts[3..], [Part::Content("Done.".into())]);
}

#[test]
fn thinking_opened_by_the_prompt() {
    let parts = whole(Format::Mimo, true, "a </thin b</think> \n c ");
    assert_eq!(
        parts,
        [
            Part::Reasoning("a </thin b".into()),
            Part::Content("c ".into())
        ]
    );
}

#[test]
fn arguments_stream_before_the_call_ends() {
    let mut parser = Parser::new(Format::Mimo, expect(false));
    let mut out = Vec::new();
    parser.push("<tool_call><function=weather><parameter=city>Par", &mut out);
    let text: String = join(out)
        .into_iter()
        .filter_map(|part| match part {
            Part::Arguments { text, .. } => Some(text),
            _ => None,
        })
        .collect();
    assert_eq!(text, "{\"city\": \"Par");
}

/// Name and arguments of the calls of an answer that ended by itself, or by its limit.
fn ended(format: Format, text: &str, complete: bool) -> (Vec<String>, bool) {
    let mut parser = Parser::new(format, expect(false));
    let mut out = Vec::new();
    parser.push(text, &mut out);
    let sound = parser.finish(complete, &mut out);
    let texts = join(out).into_iter().filter_map(|part| match part {
        Part::Arguments { text, .. } => Some(text),
        _ => None,
    });
    (texts.collect(), sound)
}

#[test]
fn a_call_left_open_is_closed_unless_the_limit_cut_it() {
    let open = "<tool_call><function=weather><parameter=city>Par";
    assert_eq!(
        ended(Format::Mimo, open, true),
        (vec![r#"{"city": "Par"}"#.to_owned()], true)
    );
    assert_eq!(
        ended(Format::Mimo, open, false),
        (vec![r#"{"city": "Par"#.to_owned()], true)
    );
    let typed = "<tool_call><function=weather><parameter=days>3";
    assert_eq!(
        ended(Format::Mimo, typed, true).0,
        [r#"{"days": 3}"#.to_owned()]
    );
}

#[test]
fn every_beginning_of_an_answer_ends_in_json() {
    let plain =
        "{\"name\": \"weather\", \"arguments\": {\"city\": \"\\u00e9\\n\", \"days\": [1, {}]}}";
    let hermes = format!("<tool_call>{plain}</tool_call>");
    for (format, text) in [
        (Format::Mimo, MIMO),
        (Format::Hermes, hermes.as_str()),
        (Format::Harmony, HARMONY),
    ] {
        for (at, _) in text.char_indices() {
            let (texts, sound) = ended(format, &text[..at], true);
            assert!(sound, "{}: {texts:?}", &text[..at]);
            for arguments in texts {
                assert!(
                    serde_json::from_str::<Value>(&arguments).is_ok(),
                    "{arguments}"
                );
            }
        }
    }
    let wrong = "<tool_call>{\"name\": \"weather\", \"arguments\": {\"days\": 1,}}</tool_call>";
    assert!(!ended(Format::Hermes, wrong, true).1);
}

/// Texts made of what parsers trip over.
fn texts() -> impl Strategy<Value = String> {
    let tokens = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=weather>",
        "</function>",
        "<parameter=city>",
        "<parameter=days>",
        "</parameter>",
        "null",
        "12",
        "&amp;",
        "&#x41;",
        "&",
        ";",
        "<",
        ">",
        "\n",
        " ",
        "ö",
        "{\"name\": \"weather\", \"arguments\": {",
        "}",
        "\"",
        "\\",
        "{",
        "[",
        "]",
        "<|channel|>",
        "<|message|>",
        "final",
        "analysis",
        "<|end|>",
        "commentary to=functions.f ",
        "<|start|>assistant",
        "a",
        "bc",
    ]);
    prop::collection::vec(tokens, 0..40).prop_map(|tokens| tokens.concat())
}

fn cut(text: &str, cuts: &[prop::sample::Index]) -> Vec<String> {
    let mut at: Vec<usize> = cuts.iter().map(|i| i.index(text.len() + 1)).collect();
    at.extend([0, text.len()]);
    at.sort_unstable();
    let mut at: Vec<usize> = at
        .into_iter()
        .filter(|i| text.is_char_boundary(*i))
        .collect();
    at.dedup();
    at.windows(2).map(|w| text[w[0]..w[1]].to_owned()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn cutting_changes_nothing(
        text in prop_oneof![
            texts(), Just(MIMO.to_owned()), Just(HERMES.to_owned()), Just(HARMONY.to_owned())
        ],
        thinking in any::<bool>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..30),
    ) {
        let cut = cut(&text, &cuts);
        let cut: Vec<&str> = cut.iter().map(String::as_str).collect();
        for format in [Format::Mimo, Format::Hermes, Format::Harmony] {
            prop_assert_eq!(pieces(format, thinking, &cut), whole(format, thinking, &text));
        }
    }
}
