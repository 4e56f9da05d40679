// What the scripts of JavaScript clients share: as checks.py.
export const URL_ = process.env.LLUMD_URL ?? "http://127.0.0.1:8000";
export const BASE = `${URL_}/v1`;
export const MODEL = process.env.LLUMD_MODEL ?? "demo";
export const KEY = process.env.LLUMD_KEY ?? "any";

const checks = [];

export function check(name, run) {
  checks.push([name, run]);
}

export async function main() {
  for (const [name, run] of checks) {
    let why = "";
    try {
      await run();
    } catch (error) {
      why = `${error.name}: ${error.message}`.replaceAll("\n", " ").slice(0, 300);
    }
    console.log(JSON.stringify({ check: name, ok: why === "", why }));
  }
}
