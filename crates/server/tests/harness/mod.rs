//! A server over a scripted decoder, asked through its router.

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request};
use engine::scripted::{Drafter, Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineOptions};
use http_body_util::BodyExt;
use serde_json::Value;
use server::text::ModelText;
use server::{Served, Settings, router};
use std::sync::Arc;
use tower::ServiceExt;

/// See the module.
pub(crate) struct Server {
    /// Its parts.
    pub(crate) served: Arc<Served>,
    router: Router,
}

/// What came back.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }

    /// The data of a stream, which has to end properly.
    pub(crate) fn events(&self) -> Vec<Value> {
        let lines = self
            .text
            .lines()
            .filter_map(|line| line.strip_prefix("data: "));
        let (done, events): (Vec<&str>, Vec<&str>) = lines.partition(|line| *line == "[DONE]");
        assert_eq!(done.len(), 1, "{}", self.text);
        events
            .iter()
            .map(|e| serde_json::from_str(e).unwrap())
            .collect()
    }

    pub(crate) fn param(&self) -> String {
        self.json()["error"]["param"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

/// What comes after `prompt` tokens: the text, byte by byte; `\u{100}` in it is the end token, which
/// also follows its last byte in a script that has one.
fn script(text: &str) -> Script {
    let tokens: Vec<u32> = text
        .chars()
        .flat_map(|c| match c {
            '\u{100}' => vec![256],
            c => c.to_string().bytes().map(u32::from).collect(),
        })
        .collect();
    Script::Token(Arc::new(move |sequence| {
        // The answer begins after the template's `assistant\n`, or after any token below 32.
        let start = sequence
            .iter()
            .rposition(|t| *t < 32)
            .map_or(0, |at| at + 1);
        tokens[(sequence.len() - start) % tokens.len()]
    }))
}

impl Server {
    pub(crate) fn saying(text: &str) -> Self {
        Self::build(text, |_| {})
    }

    pub(crate) fn build(text: &str, change: impl FnOnce(&mut Settings)) -> Self {
        Self::with(text, ScriptedOptions::default(), change)
    }

    #[allow(dead_code)]
    pub(crate) fn failing_at(step: u64) -> Self {
        let options = ScriptedOptions {
            fault_at: Some(step),
            ..ScriptedOptions::default()
        };
        Self::with("abc", options, |_| {})
    }

    pub(crate) fn with(
        text: &str,
        options: ScriptedOptions,
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        Self::scripted(script(text), options, change)
    }

    pub(crate) fn scripted(
        script: Script,
        options: ScriptedOptions,
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let vocab_size = options.limits.vocab_size;
        let decoder = Scripted::new(options, script);
        let model = ModelText::bytes(vocab_size).unwrap();
        let options = EngineOptions {
            calibrate: false,
            ..EngineOptions::default()
        };
        let engine = Engine::start(Box::new(decoder), model.detokenizer(), options).unwrap();
        let mut settings = Settings {
            model_name: "test".to_owned(),
            ..Settings::default()
        };
        change(&mut settings);
        let served = Served::new(settings, engine, model).unwrap();
        let router = router(&served);
        Self { served, router }
    }

    /// Says random letters that only masks make JSON of, those of JSON likelier, and what ends strings, lists and
    /// objects by `ending` more; its drafter is near it, so that many drafts fit and many do not.
    #[allow(dead_code)]
    pub(crate) fn scribbling(ending: f32) -> Self {
        let Script::Logits(random) = Script::random(7, 6.0) else {
            unreachable!("random logits")
        };
        let script = Script::Logits(Arc::new(move |tokens, logits| {
            random(tokens, logits);
            for letter in b"\"\"{}[]:, 0123456789-abcdefnrulty" {
                logits[usize::from(*letter)] += 4.0;
            }
            for letter in b"\"]}" {
                logits[usize::from(*letter)] += ending;
            }
        }));
        let options = ScriptedOptions {
            drafter: Drafter::Near,
            ..ScriptedOptions::default()
        };
        Self::scripted(script, options, |_| {})
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Reply {
        let mut request = Request::builder()
            .method(method)
            .uri(path.replace(['{', '}'], "x"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Reply {
            status: parts.status.as_u16(),
            headers: parts.headers,
            text: String::from_utf8(bytes.to_vec()).unwrap(),
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], "").await
    }

    /// Names the model where the body does not.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        let mut body = body.clone();
        if path.starts_with("/v1/") && body.get("model").is_none() {
            body["model"] = "test".into();
        }
        self.send("POST", path, &[], &body.to_string()).await
    }
}
