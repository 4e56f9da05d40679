// requires: ai @ai-sdk/openai-compatible @ai-sdk/openai zod
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { BASE, KEY, MODEL, check, main } from "./checks.mjs";

const here = createOpenAICompatible({
  name: "llumd", baseURL: BASE, apiKey: KEY, supportsStructuredOutputs: true, includeUsage: true,
});
const openai = createOpenAI({ baseURL: BASE, apiKey: KEY });
const prompt = "Say hi.";
const City = z.object({ name: z.string().max(12), people: z.number().int().min(0).max(999) });

check("text", async () => {
  const { usage } = await generateText({ model: here(MODEL), prompt, maxOutputTokens: 8, maxRetries: 0 });
  if (!usage.outputTokens) throw new Error("no usage");
});
check("stream", async () => {
  const result = streamText({ model: here(MODEL), prompt, maxOutputTokens: 8, maxRetries: 0, onError() {} });
  for await (const part of result.fullStream) if (part.type === "error") throw part.error;
  if (!(await result.usage).outputTokens) throw new Error("no usage");
});
check("object", async () => {
  await generateObject({ model: here(MODEL), schema: City, prompt, maxOutputTokens: 100, maxRetries: 0 });
});
check("tools", async () => {
  const result = await generateText({
    model: here(MODEL), prompt, maxOutputTokens: 80, maxRetries: 0, toolChoice: "required",
    tools: { city: tool({ description: "A city", inputSchema: City }) },
  });
  if (result.toolCalls[0].toolName !== "city") throw new Error("no call");
});
check("responses", async () => {
  await generateText({ model: openai(MODEL), prompt, maxOutputTokens: 16, maxRetries: 0 });
});
check("chat_of_openai", async () => {
  await generateText({ model: openai.chat(MODEL), prompt, maxOutputTokens: 8, maxRetries: 0 });
});
check("completion_of_openai", async () => {
  await generateText({ model: openai.completion(MODEL), prompt, maxOutputTokens: 8, maxRetries: 0 });
});
await main();
