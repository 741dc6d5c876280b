"""A conversation with a model on a terminal, or line by line from a pipe."""

import json
import queue
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from megatron_qwen.errors import UserError
from megatron_qwen.files import atomic_write
from megatron_qwen.inference.request import Answer, Sampling
from megatron_qwen.inference.service import Service
from tools.generation.chat import ChatTemplate
from tools.generation.loaded import LoadedModel
from tools.generation.text_stream import TextStream

_HELP = """/reset         forgets the conversation
/system TEXT   changes the system message, and forgets the conversation; without TEXT there is none
/save FILE     writes the conversation as JSON
/quit          ends; so does the end of the input. Ctrl-C ends an answer."""

_ONE_KEY_S = 0.3


class _Events:
    """What happens to an answer, for the thread that reads."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | Answer | UserError | None] = queue.SimpleQueue()

    def token(self, token: int, logprob: float) -> None:
        """A token was chosen."""
        self.queue.put(token)

    def finished(self, answer: Answer) -> None:
        """The answer is whole."""
        self.queue.put(answer)

    def failed(self, error: UserError) -> None:
        """It cannot be answered."""
        self.queue.put(error)


@dataclass
class ChatSession:
    """The conversation.

    Args:
        model: that answers.
        service: of its ranks.
        template: how turns become a prompt.
        sampling: of the answers.
        system: the first turn; None is none.
        given: where turns come from.
        shown: where answers go.
    """

    model: LoadedModel
    service: Service
    template: ChatTemplate
    sampling: Sampling
    system: str | None
    given: TextIO
    shown: TextIO
    turns: list[dict[str, str]] = field(default_factory=list)
    _answering: tuple[int, _Events] | None = None

    def run(self) -> None:
        """Talks until the end of the input; then the service may end. In a thread beside the service's loop."""
        try:
            live = self.given.isatty()
            while True:
                if live:
                    self._say("> ")
                line = self.given.readline()
                if not line or (text := line.strip()) == "/quit":
                    return
                if text.startswith("/"):
                    self._command(*text.partition(" ")[::2])
                elif text:
                    self._turn(text)
        finally:
            self.service.stop()

    def interrupt(self) -> bool:
        """Ends the answer that is being given; False if there is none."""
        answering = self._answering
        if answering is None:
            return False
        number, events = answering
        self.service.cancel(number)
        events.queue.put(None)
        return True

    def _turn(self, text: str) -> None:
        messages = [*self._system(), *self.turns, {"role": "user", "content": text}]
        try:
            (ids,) = self.model.tokenizer.encode_batch([self.template.render(messages)])
        except UserError as error:
            self._say(f"{error.render()}\n")
            return
        room = self.model.engine.stage.longest - len(ids)
        if room < 1:
            self._say(f"the conversation has {len(ids):,} tokens, which leave no room for an answer: /reset\n")
            return
        how = replace(
            self.sampling, max_new_tokens=min(room, self.sampling.max_new_tokens), stop_tokens=self.model.chat_ends
        )
        answer = self._answer(tuple(ids), how)
        if answer is not None:
            self.turns += [messages[-1], {"role": "assistant", "content": answer}]

    def _answer(self, prompt: tuple[int, ...], how: Sampling) -> str | None:
        """The answer's text, shown as it comes; None if it failed."""
        events, stream, text = _Events(), TextStream(self.model.tokenizer.decode, how.stop_strings), ""
        self._answering = self.service.submit(prompt, how, events), events
        try:
            while isinstance(event := events.queue.get(), int):
                text += self._say(stream.add(event))
        finally:
            self._answering = None
        if isinstance(event, UserError):
            self._say(f"{event.render()}\n")
            return None
        text += self._say(stream.end())
        self._say("\n")
        return text

    def _command(self, name: str, rest: str) -> None:
        if name == "/reset":
            self.turns.clear()
        elif name == "/system":
            self.system = rest.strip() or None
            self.turns.clear()
        elif name == "/save" and rest.strip():
            self._save(Path(rest.strip()))
        else:
            self._say(f"{_HELP}\n")

    def _save(self, path: Path) -> None:
        content: dict[str, Any] = {"model": self.model.source.name, "messages": [*self._system(), *self.turns]}
        if path.exists():
            self._say(f"{path} exists; name another file\n")
            return
        try:
            atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            self._say(f"{path} cannot be written ({error.strerror})\n")

    def _system(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _say(self, text: str) -> str:
        self.shown.write(text)
        self.shown.flush()
        return text


def talk(session: ChatSession) -> None:
    """Runs a session on rank 0, whose main thread has the service's loop."""

    heard = [-_ONE_KEY_S]

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Of one Ctrl-C a rank hears twice: from the terminal, and from the launcher that passes it on.
        before, heard[0] = heard[0], time.monotonic()
        if heard[0] - before > _ONE_KEY_S and not session.interrupt():
            session.service.stop()

    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=session.run, name="chat", daemon=True).start()
    session.service.loop()
