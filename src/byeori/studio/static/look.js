// Dark or light as the system prefers, until the button says otherwise. It runs before the page is drawn.
"use strict";
{
  const KEY = "byeori-look", SYSTEM = "(prefers-color-scheme: dark)";
  const system = matchMedia(SYSTEM);
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules])
    .filter((rule) => rule.media && rule.media.mediaText.includes("prefers-color-scheme"));
  const kept = () => {
    try { return localStorage.getItem(KEY); } catch { return null; } // a browser may forbid it
  };
  const show = () => {
    for (const rule of rules) rule.media.mediaText = { dark: "all", light: "not all" }[kept()] ?? SYSTEM;
  };
  show();
  addEventListener("storage", show); // another window of the page
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#look")) return;
    const wanted = (kept() ?? (system.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
    try {
      if ((wanted === "dark") === system.matches) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, wanted);
    } catch { return; }
    show();
  });
}
