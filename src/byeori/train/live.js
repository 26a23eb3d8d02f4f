// Loads the page again every five seconds, unless its reader has opened or marked something.
setInterval(() => {
  if (!document.querySelector("details[open]") && document.getSelection().isCollapsed) location.reload();
}, 5000);
