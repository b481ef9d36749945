// One streamed answer: asks, reads the events, keeps the account. Knows nothing of the page.
//
// An answer is {content, reasoning, steps, metrics, usage, finish, error}; a step is
// {text, tokens, accepted, width, position, draft_us, verify_us, at}.

export function headers(key) {
  const out = { "content-type": "application/json" };
  if (key) out.authorization = `Bearer ${key}`;
  return out;
}

export function blank() {
  return { role: "assistant", content: "", reasoning: "", steps: [], metrics: null, usage: null,
    finish: null, error: null, started: performance.now(), first: null, last: null, tokens: 0 };
}

function take(answer, event) {
  if (event.error) { answer.error = event.error.message; return; }
  const now = performance.now();
  const choice = event.choices?.[0];
  if (event.usage) answer.usage = event.usage;
  if (event.metrics) answer.metrics = event.metrics;
  if (!choice) return;
  const delta = choice.delta ?? {};
  const text = delta.content ?? "";
  answer.content += text;
  answer.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  const count = choice.token_ids?.length ?? 0;
  answer.tokens += count;
  if (count) { answer.first ??= now; answer.last = now; }
  if (event.step) {
    const { accepted, width, position, draft_us, verify_us } = event.step;
    answer.steps.push({ text: text || delta.reasoning_content || "", tokens: count, accepted, width,
      position, draft_us, verify_us, at: now - answer.started });
  } else if (text && answer.steps.length) {
    answer.steps[answer.steps.length - 1].text += text;
  }
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

// Reads events until the end. `changed` is called once for each network read, not for each token.
export async function run(body, key, signal, answer, changed) {
  const request = { ...body, stream: true, return_steps: true, return_token_ids: true,
    include_metrics: true, stream_options: { include_usage: true } };
  const response = await fetch("/v1/chat/completions",
    { method: "POST", headers: headers(key), body: JSON.stringify(request), signal });
  if (!response.ok) {
    const text = await response.text();
    let message = text;
    try { message = JSON.parse(text).error.message; } catch { /* not JSON: shown as it is */ }
    const wait = response.headers.get("retry-after");
    throw new Error(wait ? `${message} (again in ${wait} s)` : message);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const line = rest.slice(0, end);
      rest = rest.slice(end + 2);
      if (line.startsWith("data: ") && line !== "data: [DONE]") take(answer, JSON.parse(line.slice(6)));
    }
    changed();
  }
}
