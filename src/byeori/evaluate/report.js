(() => {
  "use strict";
  document.documentElement.classList.add("js");
  const [list, order, search, count, none] = ["cards", "order", "search", "count", "none"].map(id => document.getElementById(id));
  if (!list) return;
  const cards = [...list.children];
  const chips = [...document.querySelectorAll(".chips button")];
  let kind = "";

  const orders = { original: ["index", 1], best: ["gain", -1], worst: ["gain", 1], longest: ["length", -1] };
  function sort() {
    const [name, sign] = orders[order.value];
    const key = card => card.dataset[name] === "" ? Infinity : sign * card.dataset[name]; // rows without a score: last
    list.append(...cards.sort((a, b) => key(a) - key(b)));
  }

  const plain = text => text.normalize("NFC").toLowerCase().replace(/\s+/g, " ");
  const text = card => [...card.querySelectorAll(".text")].map(box => box.textContent).join(" \u0000 ");
  const texts = new Map(cards.map(card => [card, plain(text(card))]));
  function filter() {
    const wanted = plain(search.value.trim());
    const passes = card => texts.get(card).includes(wanted) && (!kind || card.dataset.is.split(" ").includes(kind));
    for (const card of cards) card.hidden = !passes(card);
    const shown = cards.filter(card => !card.hidden).length;
    const form = wanted || kind ? "some" : cards.length === 1 ? "one" : "many";
    count.textContent = count.dataset[form].replace("{n}", cards.length).replace("{shown}", shown);
    none.hidden = shown > 0;
    for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.dataset.filter === kind));
  }

  document.addEventListener("click", event => {
    const chosen = event.target.closest("[data-filter]");
    const row = event.target.closest('a[href^="#row-"]');
    if (chosen) kind = chosen.dataset.filter;
    else if (row && document.querySelector(row.getAttribute("href"))?.hidden) { kind = ""; search.value = ""; }
    else return;
    filter();
  });
  order.addEventListener("change", sort);
  search.addEventListener("input", filter);

  // the shown rows as CSV; text that a spreadsheet would run as a formula gets an apostrophe
  const cell = value => `"${(/^[=+@\t-]/.test(value) && isNaN(value) ? "'" + value : value).replace(/"/g, '""')}"`;
  function csv() {
    const shown = [...list.children].filter(card => !card.hidden);
    const columns = [...new Set(shown.flatMap(card => [...card.querySelectorAll(".asked h3")].map(head => head.textContent)))];
    const sides = ["reference", "rejected", "base", "tuned"].filter(side => list.querySelector(`[data-side="${side}"]`));
    const lines = [["row", "gain", "is", ...columns, ...sides]];
    for (const card of shown) {
      const asked = new Map([...card.querySelectorAll(".asked > div")].map(box => [box.querySelector("h3").textContent, box.querySelector(".text").textContent]));
      const side = name => card.querySelector(`[data-side="${name}"] .text`)?.textContent ?? "";
      lines.push([card.dataset.index, card.dataset.gain, card.dataset.is.trim(), ...columns.map(name => asked.get(name) ?? ""), ...sides.map(side)]);
    }
    return "\uFEFF" + lines.map(line => line.map(cell).join(",")).join("\r\n") + "\r\n";
  }
  document.getElementById("csv").addEventListener("click", event => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = event.target.dataset.name;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  document.getElementById("print").addEventListener("click", () => print());
  sort();
  filter();
})();
