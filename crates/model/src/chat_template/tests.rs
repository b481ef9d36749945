use super::*;
use serde_json::json;

fn render(source: &str, variables: &[(&str, Json)]) -> Result<String, ModelError> {
    let variables: Vec<(String, Json)> = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect();
    let conversation = Conversation {
        variables: &variables,
        ..Conversation::default()
    };
    ChatTemplate::new(source)?.render(&conversation)
}

/// Expected texts are what CPython 3.11's `json.dumps(x, ensure_ascii=False, ...)` prints.
#[test]
fn json_is_written_as_python_writes_it() {
    let x = json!({"b": [1, 2.0, 1e16, 1e-5, 0.1, -0.0, true, null], "a": "<é>\n\u{1}\"'&", "e": [], "f": {}});
    let plain = r#"{"b": [1, 2.0, 1e+16, 1e-05, 0.1, -0.0, true, null], "a": "<é>\n\u0001\"'&", "e": [], "f": {}}"#;
    assert_eq!(render("{{ x | tojson }}", &[("x", x)]).unwrap(), plain);
    let x = json!({"b": [1, {"c": "é😀"}], "a": []});
    let indented =
        "{\n  \"b\": [\n    1,\n    {\n      \"c\": \"é😀\"\n    }\n  ],\n  \"a\": []\n}";
    assert_eq!(
        render("{{ x | tojson(indent=2) }}", &[("x", x.clone())]).unwrap(),
        indented
    );
    let sorted = r#"{"a":[],"b":[1,{"c":"\u00e9\ud83d\ude00"}]}"#;
    let source = "{{ x | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}";
    assert_eq!(render(source, &[("x", x)]).unwrap(), sorted);
}

/// Expected texts are what CPython 3.11's `str` prints.
#[test]
fn values_are_printed_as_python_prints_them() {
    let x = json!({"a": ["it's", "say \"x\"", "\t\\", true, null, 1.0, 1e22], "b": 2});
    let expected = r#"{'a': ["it's", 'say "x"', '\t\\', True, None, 1.0, 1e+22], 'b': 2}"#;
    assert_eq!(render("{{ x }}", &[("x", x)]).unwrap(), expected);
    assert_eq!(
        render("{{ true }} {{ none }} {{ 1.5 }} {{ missing }}.", &[]).unwrap(),
        "True None 1.5 ."
    );
    assert_eq!(
        render("{{ 'a' ~ x ~ none }}", &[("x", json!(false))]).unwrap(),
        "aFalseNone"
    );
}

#[test]
fn python_methods_slices_and_loop_controls() {
    let source = "{% set m = x[::-1] %}{% for c in m %}{% if c == 'b' %}{% continue %}{% endif %}{{ c.upper() }}{% endfor %}\
                  {{ '</think> hi'.split('</think>')[-1].lstrip() }}{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}";
    let variables = [
        ("x", json!(["a", "b", "c"])),
        ("d", json!({"z": 1, "y": 2})),
    ];
    assert_eq!(render(source, &variables).unwrap(), "CAhiz=1;y=2;");
}

#[test]
fn generation_tags_do_nothing() {
    let source = "a\n{%- generation -%}\n b {% endgeneration %}\nc";
    assert_eq!(render(source, &[]).unwrap(), "ab c");
}

#[test]
fn exceptions_reach_the_caller_in_one_line() {
    let error = render("{{ raise_exception('only user\nturns') }}", &[]).unwrap_err();
    assert_eq!(error.to_string(), "chat template: only user turns (line 1)");
    let error = render("{% if %}", &[]).unwrap_err().to_string();
    assert!(
        error.starts_with("chat template: ") && error.ends_with("(line 1)"),
        "{error}"
    );
    assert!(render("{{ missing.field }}", &[]).is_err());
}

#[test]
fn endless_templates_stop() {
    let source = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    assert!(render(source, &[]).is_err());
    assert!(render(&"(".repeat(100_000), &[]).is_ok());
    assert!(render(&format!("{{{{ {} }}}}", "(".repeat(100_000)), &[]).is_err());
}

#[test]
fn time_formats_are_checked() {
    let year = render("{{ strftime_now('%Y') }}", &[]).unwrap();
    assert_eq!(year.len(), 4);
    assert!(render("{{ strftime_now('%!') }}", &[]).is_err());
}

#[test]
fn templates_come_from_either_file() {
    let dir = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::open(dir.path()).unwrap().is_none());
    let config = json!({"bos_token": {"content": "<s>"}, "eos_token": null,
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}]});
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let messages = [json!({"role": "user", "content": "hi"})];
    let conversation = Conversation {
        messages: &messages,
        ..Conversation::default()
    };
    let template = ChatTemplate::open(dir.path()).unwrap().unwrap();
    assert_eq!(template.render(&conversation).unwrap(), "<s>hi");
    std::fs::write(
        dir.path().join("chat_template.jinja"),
        "{{ tools is none }}{{ messages | length }}\n",
    )
    .unwrap();
    let template = ChatTemplate::open(dir.path()).unwrap().unwrap();
    assert_eq!(template.render(&conversation).unwrap(), "True1");
}
