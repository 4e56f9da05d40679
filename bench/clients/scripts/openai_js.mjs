// requires: openai
import OpenAI, { AzureOpenAI } from "openai";
import { BASE, KEY, MODEL, URL_, check, main } from "./checks.mjs";

const client = new OpenAI({ baseURL: BASE, apiKey: KEY, maxRetries: 0 });
const SAY = [{ role: "user", content: "Say hi." }];
const tool = {
  type: "function",
  function: { name: "f", parameters: { type: "object", properties: { a: { type: "integer" } }, required: ["a"] } },
};

check("chat", async () => {
  const answer = await client.chat.completions.create({ model: MODEL, messages: SAY, max_tokens: 8 });
  if (!answer.choices[0].finish_reason || !answer._request_id) throw new Error("no answer");
});
check("stream", async () => {
  const stream = await client.chat.completions.create({ model: MODEL, messages: SAY, max_tokens: 8, stream: true });
  let last;
  for await (const chunk of stream) last = chunk;
  if (!last.choices[0].finish_reason) throw new Error("no end");
});
check("stream_helper", async () => {
  const runner = client.chat.completions.stream({ model: MODEL, messages: SAY, max_tokens: 8 });
  await runner.finalChatCompletion();
});
check("completions", async () => {
  await client.completions.create({ model: MODEL, prompt: "a", max_tokens: 4, logprobs: 1 });
});
check("tools", async () => {
  const answer = await client.chat.completions.create({
    model: MODEL, messages: SAY, tools: [tool], tool_choice: "required", max_tokens: 60,
  });
  JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments);
});
check("azure", async () => {
  const azure = new AzureOpenAI({ endpoint: URL_, apiKey: KEY, apiVersion: "2024-10-21" });
  await azure.chat.completions.create({ model: MODEL, messages: SAY, max_tokens: 4 });
});
check("responses", async () => {
  await client.responses.create({ model: MODEL, input: "Say hi.", max_output_tokens: 16 });
});
await main();
