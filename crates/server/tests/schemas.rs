//! Gate 10: a thousand JSON schemas with drafting on. Every answer that is complete parses and is
//! valid by a validator that is not ours; what is not complete says `length`.
//!
//! The model says random bytes, so that only the masks make JSON of them; its drafter is near it, so
//! that drafts are accepted, cut and refused. The schemas are drawn from a seeded generator.

#[allow(dead_code)] // Each test binary uses a part of it.
mod harness;

use harness::Server;
use serde_json::{Map, Value, json};
use std::sync::Arc;

const SCHEMAS: u64 = 1000;
const TOKENS: u32 = 600;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % most
    }

    fn schema(&mut self, depth: u32) -> Value {
        let kinds = if depth == 0 { 7 } else { 12 };
        match self.below(kinds) {
            0 => self.string(),
            1 => {
                let low = self.below(2000) as i64 - 1000;
                json!({"type": "integer", "minimum": low, "maximum": low + self.below(500) as i64})
            }
            2 => json!({"type": "number", "minimum": -1, "exclusiveMaximum": self.below(90) + 1}),
            3 => {
                let name = ["boolean", "null"][self.below(2) as usize];
                json!({"type": name})
            }
            4 => {
                let values = [
                    json!("a"),
                    json!(1),
                    json!(null),
                    json!("b \" c"),
                    json!([1, {"x": 2}]),
                ];
                json!({"enum": values[..1 + self.below(5) as usize].to_vec()})
            }
            5 => json!({"const": {"k": [self.below(9), "é"]}}),
            6 => json!({"$ref": "#/$defs/leaf"}),
            7 => {
                let options = 1 + self.below(3);
                let list: Vec<Value> = (0..options).map(|_| self.schema(depth - 1)).collect();
                json!({"anyOf": list})
            }
            8 => {
                let least = self.below(3);
                json!({"type": "array", "items": self.schema(depth - 1), "minItems": least,
                    "maxItems": least + self.below(3)})
            }
            9 => self.one_of(depth),
            _ => self.object(depth),
        }
    }

    /// Branches that a constant tells apart, and one of another type.
    fn one_of(&mut self, depth: u32) -> Value {
        let branches = (0..1 + self.below(3)).map(|kind| {
            let inner = self.schema(depth - 1);
            json!({"type": "object", "properties": {"kind": {"const": kind}, "x": inner},
                "required": ["kind"], "additionalProperties": false})
        });
        let mut branches: Vec<Value> = branches.collect();
        branches.push(json!({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}));
        json!({"oneOf": branches})
    }

    fn string(&mut self) -> Value {
        let patterns = ["^[a-f]{2,9}$", "^(yes|no)+$", "^\\d{3}-[A-Z]+$", "x"];
        let formats = [
            "date",
            "uuid",
            "ipv4",
            "time",
            "date-time",
            "email",
            "unknown-to-all",
        ];
        match self.below(4) {
            0 => {
                json!({"type": "string", "pattern": patterns[self.below(4) as usize], "maxLength": 12})
            }
            1 => json!({"type": "string", "format": formats[self.below(7) as usize]}),
            2 => {
                json!({"type": "string", "minLength": self.below(4), "maxLength": 4 + self.below(20)})
            }
            _ => json!({"type": "string", "maxLength": 30}),
        }
    }

    fn object(&mut self, depth: u32) -> Value {
        let names = ["id", "name", "näme", "a b", "q\"", "list"];
        let (mut properties, mut required) = (Map::new(), Vec::new());
        for name in &names[..1 + self.below(6) as usize] {
            properties.insert((*name).to_owned(), self.schema(depth - 1));
            if self.below(2) == 0 {
                required.push(*name);
            }
        }
        json!({"type": "object", "properties": properties, "required": required,
            "additionalProperties": false})
    }
}

/// How it ended, after a look at the text of a complete answer.
async fn answer(server: &Server, number: u64) -> String {
    let mut random = Random(number);
    let mut schema = random.object(3);
    schema["$defs"] = json!({"leaf": random.string()});
    let body = json!({"messages": [{"role": "user", "content": number.to_string()}],
        "max_tokens": TOKENS, "temperature": 1, "top_p": 1, "seed": number, "draft_tokens": 7,
        "include_metrics": true,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}});
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200, "{number}: {} of {schema}", reply.text);
    let choice = &reply.json()["choices"][0];
    let finish = choice["finish_reason"].as_str().unwrap().to_owned();
    if finish == "stop" {
        let text = choice["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(text)
            .unwrap_or_else(|error| panic!("{number}: {error}: {text} of {schema}"));
        let validator = jsonschema::options()
            .should_validate_formats(true)
            .build(&schema);
        let valid = validator
            .unwrap()
            .validate(&value)
            .map_err(|e| e.to_string());
        assert_eq!(valid, Ok(()), "{number}: {text} of {schema}");
    }
    finish
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_schemas_hold_with_drafting() {
    let server = Arc::new(Server::scribbling(0.0));
    let lane = |lane: u64| {
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            let mut complete = 0;
            for number in (lane..SCHEMAS).step_by(8) {
                match answer(&server, number).await.as_str() {
                    "stop" => complete += 1,
                    other => assert_eq!(other, "length"),
                }
            }
            complete
        })
    };
    let mut complete = 0;
    for lane in (0..8).map(lane).collect::<Vec<_>>() {
        complete += lane.await.unwrap();
    }
    println!("{complete} of {SCHEMAS} complete");
    assert!(complete > SCHEMAS * 9 / 10, "{complete} complete");
    let page = server.get("/metrics").await.text;
    let accepted = page
        .lines()
        .find(|l| l.starts_with("vllm:spec_decode_num_accepted_tokens_total"));
    let accepted = accepted.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok());
    assert!(accepted > Some(1000.0), "{accepted:?} drafts accepted");
}
