(() => {
  "use strict";
  document.documentElement.classList.add("js");
  const [list, pick, search, none] = ["cards", "pick", "search", "none"].map(id => document.getElementById(id));
  if (!list) return;
  const plain = text => text.normalize("NFC").toLowerCase().replace(/\s+/g, " ");
  function show() {
    const wanted = plain(search.value.trim());
    for (const card of list.children) {
      card.hidden = Boolean(pick.value && card.id !== pick.value) || !plain(card.textContent).includes(wanted);
    }
    const alone = [...list.children].filter(card => !card.hidden);
    none.hidden = alone.length > 0;
    for (const more of list.querySelectorAll(".more")) more.open = Boolean(pick.value) && alone.length === 1;
  }
  pick.addEventListener("change", show);
  search.addEventListener("input", show);
})();
