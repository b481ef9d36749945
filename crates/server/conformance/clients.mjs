// Asks a running server through the JavaScript SDKs and the AI SDK: node clients.mjs URL MODEL.
// Versions: package.json beside this file.
import Anthropic from "@anthropic-ai/sdk";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const [base, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "Say hello." }];
const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: "none" });
const claude = new Anthropic({ baseURL: base, apiKey: "none" });
const provider = createOpenAICompatible({ name: "kilotok", baseURL: `${base}/v1`, includeUsage: true });
let passed = 0;
let failed = 0;

async function check(name, work) {
  try {
    if (!(await work())) throw new Error("an empty answer");
    passed += 1;
    console.log(`ok   ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${name}: ${error.message}`);
  }
}

await check("openai chat", async () => {
  const answer = await openai.chat.completions.create({ model, messages, max_completion_tokens: 12 });
  return answer.choices[0].message.content;
});
await check("openai chat stream", async () => {
  const options = { stream: true, stream_options: { include_usage: true } };
  const stream = await openai.chat.completions.create({ model, messages, max_completion_tokens: 12, ...options });
  let text = "";
  let usage = 0;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage?.completion_tokens ?? usage;
  }
  return usage > 0 && text;
});
await check("openai responses", async () => {
  const answer = await openai.responses.create({ model, input: "Say hello.", max_output_tokens: 16 });
  return answer.output_text;
});
await check("anthropic message", async () => {
  const answer = await claude.messages.create({ model, max_tokens: 12, messages });
  return answer.content[0].text;
});
await check("anthropic stream", async () => {
  const answer = await claude.messages.stream({ model, max_tokens: 12, messages }).finalMessage();
  return answer.content[0].text;
});
await check("ai generateText", async () => {
  const answer = await generateText({ model: provider(model), prompt: "Say hello.", maxOutputTokens: 12 });
  return answer.text;
});
await check("ai streamText", async () => {
  const answer = streamText({ model: provider(model), prompt: "Say hello.", maxOutputTokens: 12 });
  let text = "";
  for await (const piece of answer.textStream) text += piece;
  const usage = await answer.usage;
  return usage.outputTokens > 0 && text;
});
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
