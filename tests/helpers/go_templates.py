"""Go's own text/template, given what Ollama gives it (template.Execute in ollama's template/template.go)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

INSTALLED = shutil.which("go") is not None

_PROGRAM = """\
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type item struct {
	Template string
	Messages []message
}

func main() {
	var items []item
	if err := json.NewDecoder(os.Stdin).Decode(&items); err != nil {
		panic(err)
	}
	rendered := []string{}
	for _, it := range items {
		var system []string
		for _, m := range it.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(it.Template))
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": it.Messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		rendered = append(rendered, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
"""


def rendered(folder: Path, items: list[tuple[str, list[dict[str, str]]]]) -> list[str]:
    """Render templates with messages, in Go. folder: for the program and Go's cache."""
    (folder / "main.go").write_text(_PROGRAM, encoding="utf-8")
    given = [
        {"Template": template, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        for template, messages in items
    ]
    done: Any = subprocess.run(
        ["go", "run", "main.go"], cwd=folder, input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found
