// Dark or light as the system prefers, until the button says otherwise. It runs before the page is drawn.
"use strict";
{
  const KEY = "byeori-look";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules])
    .filter((rule) => rule.media && rule.media.mediaText.includes("prefers-color-scheme"));
  const kept = () => {
    try { return localStorage.getItem(KEY); } catch { return null; } // a browser may forbid it
  };
  const dark = () => (kept() ? kept() === "dark" : system.matches);
  const show = () => {
    for (const rule of rules) rule.media.mediaText = dark() ? "all" : "not all";
  };
  show();
  system.addEventListener("change", show);
  addEventListener("storage", show); // another window of the page
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#look")) return;
    const wanted = dark() ? "light" : "dark";
    try {
      if ((wanted === "dark") === system.matches) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, wanted);
    } catch { return; }
    show();
  });
}
