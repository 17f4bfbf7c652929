"""The questions and commands of `ds-offload chat`, one after the other."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from ds_offload.cli.answer_interrupt import AnswerInterrupt
from ds_offload.cli.figures import figures_line
from ds_offload.cli.named_session import NamedSession
from ds_offload.cli.progress import ProgressReport
from ds_offload.cli.typed_lines import TypedLines
from ds_offload.document_prompt import conversation_ids
from ds_offload.errors import InputError
from ds_offload.generation import GenerationOutput
from ds_offload.generator import OffloadedGenerator
from ds_offload.notices import notice, warn
from ds_offload.preparation import room_of
from ds_offload.sampling import SamplingParams
from ds_offload.session import Session
from ds_offload.session_file import SessionWriteError

HELP = """\
/save [NAME]  keep the conversation as a session of that name or path, or as the one it is of
/undo         forget the last question and its answer; again, the one before
/stats        figures of the last answer, and how much room is left
/help         this list
/exit         end, as Ctrl-D does
A line that ends with a backslash goes on in the next one. A space before a slash makes a question of the line.
Ctrl-C ends an answer; what was said of it is kept."""


class ConversationLoop:
    """Reads lines and answers them; answers go to stdout, everything else to stderr.

    Attributes:
        refused: Whether a question or command was refused.
    """

    def __init__(
        self,
        generator: OffloadedGenerator,
        session: Session,
        lines: TypedLines,
        sampling: dict[str, Any],
        named: NamedSession | None,
        sessions_dir: str | None,
    ) -> None:
        """Go on with `session`; `named` is where it is kept, if it is, and `sessions_dir` where /save puts names."""
        self.refused = False
        self._generator = generator
        self._session = session
        self._lines = lines
        self._sampling = sampling
        self._named = named
        self._sessions_dir = sessions_dir
        self._answers = 0
        self._ended = False
        self._commands = {
            "/save": self._save,
            "/undo": self._undo,
            "/stats": self._stats,
            "/help": self._help,
            "/exit": self._exit,
        }

    def run(self) -> None:
        """Answer until the input or /exit ends it.

        Raises:
            InputError: The input is not UTF-8.
            KeyboardInterrupt: Ctrl-C twice at the prompt, or where nobody types at one.
        """
        if self._lines.interactive:
            model = self._generator.loaded.source.name
            notice(f"{model}: {self._room_text()}; /help lists the commands, Ctrl-D ends the conversation")
        while not self._ended and (line := self._lines.read()) is not None:
            try:
                if line.startswith("/"):
                    name, *rest = line.split(maxsplit=1)
                    self._command(name, "".join(rest).strip())
                elif line.strip():
                    self._ask(line.strip())
            except (InputError, SessionWriteError) as error:
                self.refuse(error)
            except KeyboardInterrupt:
                if not self._lines.interactive:
                    raise
                notice("interrupted")

    def refuse(self, error: Exception) -> None:
        """Say what was wrong with a question or command; the conversation goes on."""
        self.refused = True
        notice(f"error: {' '.join(str(error).split())}")

    def _ask(self, question: str) -> None:
        self._check_room(question)
        session, before = self._session, self._session.token_ids
        interrupted = False
        self._begin_text()
        with AnswerInterrupt(self._lines.interactive) as interrupt, ProgressReport(phases=("prefill",)) as progress:
            try:
                self._print_answer(question, interrupt, progress)
            except KeyboardInterrupt:
                if not self._lines.interactive:
                    raise
                interrupted = True
        if not interrupted:
            assert session.last_output is not None
            self._say_end(session.last_output)
        elif session.token_ids is before:
            notice("interrupted; the question is forgotten")
        else:
            notice("interrupted; what was said so far is kept, and /undo forgets it")

    def _check_room(self, question: str) -> None:
        session, room = self._session, room_of(self._session.config)
        known = session.token_ids
        ids = conversation_ids(known, session.document, session.document_tokens, question, self._generator.loaded)
        if len(ids) >= room:
            raise InputError(
                f"the question takes {len(ids) - len(known):,} tokens, and {room - len(known):,} are left of "
                f"max_context={room:,} for it and its answer; ask a shorter one, /undo some, or begin with more (--ctx)"
            )

    def _begin_text(self) -> None:
        if self._answers and not self._lines.interactive:
            print()
        self._answers += 1

    def _print_answer(self, question: str, interrupt: AnswerInterrupt, progress: ProgressReport) -> None:
        def report(phase: str, done: int, total: int) -> None:
            if phase == "prefill":
                interrupt.check()
            progress(phase, done, total)

        last = ""
        try:
            # Closed between two steps the stream leaves nothing half done.
            with contextlib.closing(self._session.stream(question, on_progress=report, **self._sampling)) as stream:
                for piece in stream:
                    progress.close()
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    last = piece or last
                    interrupt.check()
        finally:
            if not last.endswith("\n"):
                print(flush=True)

    def _say_end(self, output: GenerationOutput) -> None:
        monitor = output.stats["monitor"]
        if monitor is not None and monitor["warning"] is not None:
            warn(monitor["warning"])
        if output.finish_reason == "length":
            most = SamplingParams(**self._sampling).max_new_tokens
            full = len(self._session.token_ids) >= room_of(self._session.config)
            why = "the context is full" if full else f"--max-new-tokens {most} is reached"
            notice(f"the answer is cut: {why}")

    def _command(self, name: str, rest: str) -> None:
        command = self._commands.get(name)
        if command is None:
            raise InputError(f"there is no command {name[:40]}; /help lists them, and a space before it asks it")
        if rest and name != "/save":
            raise InputError(f"{name} takes nothing behind it; leave {rest[:40]!r} out")
        command(rest)

    def _save(self, name: str) -> None:
        named = NamedSession(name, self._sessions_dir) if name else self._named
        if named is None:
            raise InputError("this conversation has no name yet; give one, as in /save book")
        ours = self._named is not None and named.folder == self._named.folder
        if named.header is not None and not ours:
            raise InputError(
                f"the session {named.folder} is there already; give another name, or remove it with "
                "`ds-offload session rm`"
            )
        header = self._session.save(named.folder)
        self._named = named
        notice(f"{len(header.token_ids):,} tokens are kept as the session {named.folder}")

    def _undo(self, _: str) -> None:
        self._session.undo()
        notice(f"the last question is forgotten; {self._room_text()}")

    def _stats(self, _: str) -> None:
        output = self._session.last_output
        if output is not None:
            kept = output.stats["kept_tokens"]
            attended = f"; {kept:,.0f} tokens attended a step" if kept is not None else ""
            notice(figures_line(output) + attended)
        notice(self._room_text())

    def _help(self, _: str) -> None:
        print(HELP, file=sys.stderr, flush=True)

    def _exit(self, _: str) -> None:
        self._ended = True

    def _room_text(self) -> str:
        tokens, room = len(self._session.token_ids), room_of(self._session.config)
        return f"{tokens:,} of {room:,} tokens, room for {room - tokens:,} more"
