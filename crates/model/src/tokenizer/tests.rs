use super::*;
use serde_json::json;

/// A byte-level BPE: the 256 bytes, one merge, two added tokens.
fn write(dir: &Path) {
    let mut vocab = serde_json::Map::new();
    let printed = |byte: u8| {
        (0..0x144)
            .filter_map(char::from_u32)
            .find(|&c| byte_of(c) == Some(byte))
            .unwrap()
    };
    for byte in 0..=255u8 {
        vocab.insert(printed(byte).to_string(), byte.into());
    }
    vocab.insert("Ġt".to_owned(), 256.into());
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [added(257, "<|im_end|>", true), added(258, "<think>", false)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["Ġ t"]},
    });
    std::fs::write(dir.join("tokenizer.json"), file.to_string()).unwrap();
}

#[test]
fn every_byte_has_its_token_and_back() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let tokenizer = Tokenizer::open(dir.path(), 300).unwrap();
    for byte in 0..=255u8 {
        assert_eq!(tokenizer.token_bytes(byte.into()), [byte]);
    }
    let text = "a to é😀\u{1}<|im_end|><think>";
    let tokens = tokenizer.encode(text).unwrap();
    assert_eq!(tokens[tokens.len() - 2..], [257, 258]);
    assert!(tokens.contains(&256));
    assert_eq!(tokenizer.decode(&tokens), "a to é😀\u{1}<think>");
    assert_eq!(tokenizer.token_bytes(257), b"<|im_end|>");
    assert_eq!(tokenizer.token_bytes(299), b"");
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
    assert_eq!(
        (tokenizer.token_id("<think>"), tokenizer.vocab_size()),
        (Some(258), 300)
    );
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let message = |vocab_size| {
        Tokenizer::open(dir.path(), vocab_size)
            .err()
            .unwrap()
            .to_string()
    };
    assert!(message(258).contains("token `<think>` has id 258, config.json says vocab_size 258"));
    std::fs::write(dir.path().join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    assert!(message(300).contains("field `decoder`: expected type ByteLevel, found none"));
    std::fs::write(
        dir.path().join("tokenizer.json"),
        r#"{"decoder": {"type": "ByteLevel"}, "model": 5}"#,
    )
    .unwrap();
    assert!(message(300).contains("tokenizer.json: not a tokenizer"));
    std::fs::write(
        dir.path().join("tokenizer.json"),
        r#"{"decoder": {"type": "ByteLe"#,
    )
    .unwrap();
    assert!(message(300).contains("tokenizer.json: not a tokenizer"));
    std::fs::write(dir.path().join("tokenizer.json"), [0xff, 0xfe]).unwrap();
    assert!(message(300).contains("expected UTF-8 text, found byte 0xff at 0"));
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(message(300).contains("tokenizer.json: not found"));
}
