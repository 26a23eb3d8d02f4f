// Copying, dropping files and keys. Everything else is HTML and htmx; without this file the forms still work.
"use strict";
const said = () => document.getElementById("said");

// on a phone the navigation scrolls sideways
document.querySelector("header [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copy(document.getElementById(button.dataset.copy).textContent);
  const chip = event.target.closest("[data-insert]");
  if (chip) insert(document.getElementById(chip.dataset.into), chip.dataset.insert);
});

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without https, as on a phone that looks at another machine
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  said().classList.remove("hidden");
  setTimeout(() => said().classList.add("hidden"), 1500);
}

function insert(field, text) {
  field.focus();
  field.setRangeText(text, field.selectionStart, field.selectionEnd, "end");
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

for (const form of document.querySelectorAll("[data-drop]")) {
  form.addEventListener("dragover", (event) => { event.preventDefault(); form.classList.add("over"); });
  form.addEventListener("dragleave", () => form.classList.remove("over"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("over");
    if (!event.dataTransfer.files.length) return;
    form.querySelector("[type=file]").files = event.dataTransfer.files;
    form.requestSubmit();
  });
}

document.addEventListener("keydown", (event) => {
  if (event.altKey && !event.ctrlKey && !event.metaKey && /^Digit[1-9]$/.test(event.code)) {
    const link = document.querySelector(`[data-key="${event.code.slice(-1)}"]`);
    if (link) { event.preventDefault(); link.click(); }
  }
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && event.target.form) event.target.form.requestSubmit();
});

// of what a running command said, the newest lines
const newest = () => document.querySelectorAll("#job pre").forEach((pre) => { pre.scrollTop = pre.scrollHeight; });
newest();
document.addEventListener("htmx:afterSwap", newest);

// a part that is loaded again keeps what was opened in it
let opened = new Map(), before = new Set();
const summaries = () => [...document.querySelectorAll("main details > summary")];
document.addEventListener("htmx:beforeSwap", () => {
  before = new Set(summaries());
  opened = new Map(summaries().map((summary) => [summary.textContent, summary.parentElement.open]));
});
document.addEventListener("htmx:afterSwap", () => {
  for (const summary of summaries()) {
    if (!before.has(summary) && opened.has(summary.textContent)) summary.parentElement.open = opened.get(summary.textContent);
  }
});
