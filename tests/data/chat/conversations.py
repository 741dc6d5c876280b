"""Random conversations: tools, empty and missing texts, Unicode, HTML, control tokens in texts."""

import random
from typing import Any

WORDS = (
    *(
        "hello",
        "what",
        "is",
        "42",
        "3.14",
        "the",
        "answer",
        "café",
        "e\u0301",
        "漢字",
        "日本語",
        "مرحبا",
        "🙂",
        "👨‍👩‍👧",
        "ﬁ",
    ),
    *("<b>bold</b>", "&amp;", '"quoted"', "it's", "{{ braces }}", "{% raw %}", "\\n", "\t", "\n", "\n\n", "  ", "\r\n"),
    *("def f(x):\n    return x", "https://a.b/c?d=e&f=g", "\u00a0", "\u200b", "#", "```python\nprint(1)\n```"),
)
SPELLED = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>assistant\n", "<tool_call>", "</tool_response>")
NAMES = ("look_up", "add", "名前", "a.b")


class Dice(random.Random):
    """Makes conversations.

    Args:
        seed: of them.
        spelled: whether texts may spell control tokens.
    """

    def __init__(self, seed: int, *, spelled: bool = False) -> None:
        super().__init__(seed)
        self._words = (*WORDS, *SPELLED) if spelled else WORDS

    def text(self, *, least: int = 0) -> str:
        """Words with spaces or without, maybe with some around them."""
        words = self.choices(self._words, k=self.randint(least, 8))
        return self.choice(("", "", "", " ", "\n")) + self.choice((" ", "")).join(words) + self.choice(("", "", "\n"))

    def value(self, depth: int = 0) -> Any:
        """A JSON value."""
        kinds = [self.text(), self.randint(-5, 5), 1.5, True, None]
        if depth < 2:
            kinds += [[self.value(depth + 1) for _ in range(2)], self.arguments(depth + 1)]
        return self.choice(kinds)

    def arguments(self, depth: int = 0) -> dict[str, Any]:
        """Of a call."""
        return {self.choice(("x", "query", "é")): self.value(depth) for _ in range(self.randint(0, 2))}

    def tools(self) -> list[dict[str, Any]]:
        """Schemas, often none."""
        if self.random() < 0.6:
            return []
        parameters = {"type": "object", "properties": {"x": {"type": "string", "description": self.text()}}}
        inner = {"name": self.choice(NAMES), "description": self.text(), "parameters": parameters}
        return [{"type": "function", "function": inner}] * self.randint(1, 2)

    def conversation(self, *, plain: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Messages and tools; plain ones have user and assistant in turn and no tools."""
        messages: list[dict[str, Any]] = []
        if self.random() < 0.5:
            messages.append({"role": "system", "content": self.text()})
        for _ in range(self.randint(1, 4)):
            messages.append({"role": "user", "content": self.text()})
            if not plain and self.random() < 0.1:
                messages.append({"role": "system", "content": self.text()})
            if not plain and self.random() < 0.3:
                messages += self._calls()
            messages.append({"role": "assistant", "content": self.text()})
        return messages, [] if plain else self.tools()

    def _calls(self) -> list[dict[str, Any]]:
        calls = [{"name": self.choice(NAMES), "arguments": self.arguments()} for _ in range(self.randint(1, 3))]
        if self.random() < 0.5:
            calls = [{"type": "function", "id": str(at), "function": call} for at, call in enumerate(calls)]
        asked: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
        if self.random() < 0.8:
            asked["content"] = self.choice(("", self.text()))
        return [asked, *({"role": "tool", "content": self.text()} for _ in calls)]
