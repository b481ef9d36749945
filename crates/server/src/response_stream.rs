//! The events of a streamed response: items and their parts opened, written and closed in order, each
//! event numbered.

use crate::account::Counts;
use crate::error::{ApiError, Dialect};
use crate::generate::{Finish, Generation, Output};
use crate::parse::Part;
use crate::responses::{Form, status, text_part};
use crate::wire::{Events, Wire, only_reasoning};
use serde_json::{Value, json};

enum Open {
    Reasoning(String),
    Message(String),
    Call {
        index: u32,
        name: String,
        arguments: String,
    },
}

/// See the module.
pub(crate) struct ResponseWire {
    form: Form,
    counts: Counts,
    sequence: u32,
    /// Items that are complete.
    done: Vec<Value>,
    open: Option<Open>,
    finish: Option<Finish>,
}

impl ResponseWire {
    pub(crate) fn new(form: Form) -> Self {
        Self {
            form,
            counts: Counts::default(),
            sequence: 0,
            done: Vec::new(),
            open: None,
            finish: None,
        }
    }

    fn event(&mut self, name: &str, mut value: Value, out: &mut Events) {
        value["type"] = name.into();
        value["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        out.named(name, &value);
    }

    fn index(&self) -> usize {
        self.done.len()
    }

    /// Opens an item; the one before is closed.
    fn begin(&mut self, open: Open, out: &mut Events) {
        self.shut("completed", out);
        let index = self.index();
        let (item, part) = match &open {
            Open::Reasoning(_) => {
                let part = json!({"type": "reasoning_text", "text": ""});
                (self.form.reasoning_item(""), Some(part))
            }
            Open::Message(_) => (
                self.form.message_item("", "in_progress"),
                Some(text_part("")),
            ),
            Open::Call { index, name, .. } => {
                (self.form.call_item(*index, name, "", "in_progress"), None)
            }
        };
        let id = item["id"].clone();
        let added = json!({"output_index": index, "item": item});
        self.event("response.output_item.added", added, out);
        if let Some(part) = part {
            let added =
                json!({"item_id": id, "output_index": index, "content_index": 0, "part": part});
            self.event("response.content_part.added", added, out);
        }
        self.open = Some(open);
    }

    /// Closes the open item.
    fn shut(&mut self, status: &str, out: &mut Events) {
        let Some(open) = self.open.take() else {
            return;
        };
        let index = self.index();
        let place = |id: &Value| json!({"item_id": id, "output_index": index, "content_index": 0});
        let item = match open {
            Open::Reasoning(text) => {
                let item = self.form.reasoning_item(&text);
                let mut done = place(&item["id"]);
                done["text"] = text.clone().into();
                self.event("response.reasoning_text.done", done, out);
                let mut part = place(&item["id"]);
                part["part"] = json!({"type": "reasoning_text", "text": text});
                self.event("response.content_part.done", part, out);
                item
            }
            Open::Message(text) => {
                let item = self.form.message_item(&text, status);
                let mut done = place(&item["id"]);
                done["text"] = text.clone().into();
                done["logprobs"] = json!([]);
                self.event("response.output_text.done", done, out);
                let mut part = place(&item["id"]);
                part["part"] = text_part(&text);
                self.event("response.content_part.done", part, out);
                item
            }
            Open::Call {
                index: call,
                name,
                arguments,
            } => {
                let item = self.form.call_item(call, &name, &arguments, status);
                let done = json!({"item_id": item["id"], "output_index": index, "name": name,
                    "arguments": arguments});
                self.event("response.function_call_arguments.done", done, out);
                item
            }
        };
        let done = json!({"output_index": index, "item": item});
        self.event("response.output_item.done", done, out);
        self.done.push(item);
    }

    fn part(&mut self, part: Part, out: &mut Events) {
        match part {
            Part::Reasoning(text) => {
                if !matches!(self.open, Some(Open::Reasoning(_))) {
                    self.begin(Open::Reasoning(String::new()), out);
                }
                self.delta("response.reasoning_text.delta", &text, out);
            }
            Part::Content(text) => {
                if !matches!(self.open, Some(Open::Message(_))) {
                    self.begin(Open::Message(String::new()), out);
                }
                self.delta("response.output_text.delta", &text, out);
            }
            Part::Call { index, name } => {
                let arguments = String::new();
                self.begin(
                    Open::Call {
                        index,
                        name,
                        arguments,
                    },
                    out,
                );
            }
            Part::Arguments { text, .. } => {
                self.delta("response.function_call_arguments.delta", &text, out);
            }
        }
    }

    fn delta(&mut self, name: &str, text: &str, out: &mut Events) {
        let index = self.index();
        let mut event = json!({"output_index": index, "delta": text});
        match &mut self.open {
            Some(Open::Reasoning(all)) => {
                all.push_str(text);
                event["item_id"] = self.form.item_id("rs", 0).into();
                event["content_index"] = 0.into();
            }
            Some(Open::Message(all)) => {
                all.push_str(text);
                event["item_id"] = self.form.item_id("msg", 0).into();
                event["content_index"] = 0.into();
                event["logprobs"] = json!([]);
            }
            Some(Open::Call {
                index, arguments, ..
            }) => {
                arguments.push_str(text);
                event["item_id"] = self.form.item_id("fc", *index).into();
            }
            None => return,
        }
        self.event(name, event, out);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        let body = error.body(Dialect::OpenAi);
        let mut response = self
            .form
            .object("failed", std::mem::take(&mut self.done), None);
        response["error"] = json!({"code": "server_error", "message": body["error"]["message"]});
        self.event("response.failed", json!({"response": response}), out);
        out.done();
    }
}

impl Wire for ResponseWire {
    fn open(&mut self, generation: &Generation, out: &mut Events) {
        self.counts.prompt = generation.prompt_tokens();
        for name in ["response.created", "response.in_progress"] {
            let response = self.form.object("in_progress", Vec::new(), None);
            self.event(name, json!({"response": response}), out);
        }
    }

    fn output(&mut self, output: Output, _: &Generation, out: &mut Events) {
        match output {
            Output::Prompt { .. } => {}
            Output::Delta { parts, piece } => {
                let count = piece.tokens.len() as u32;
                self.counts.generated += count;
                self.counts.reasoning += if only_reasoning(&parts) { count } else { 0 };
                parts.into_iter().for_each(|part| self.part(part, out));
            }
            Output::End {
                parts,
                finish,
                stats,
                ..
            } => {
                if let Finish::Failed(error) = &finish {
                    self.fail(error, out);
                    return;
                }
                parts.into_iter().for_each(|part| self.part(part, out));
                self.counts.cached = stats.cached_tokens;
                self.finish = Some(finish);
            }
        }
    }

    fn close(&mut self, _: &Generation, out: &mut Events) {
        let status = self.finish.as_ref().map_or("completed", status);
        if self.open.is_none() && self.done.is_empty() {
            self.begin(Open::Message(String::new()), out);
        }
        self.shut(status, out);
        let items = std::mem::take(&mut self.done);
        let response = self.form.object(status, items, Some(&self.counts));
        let name = format!("response.{status}");
        self.event(&name, json!({"response": response}), out);
        out.done();
    }
}
