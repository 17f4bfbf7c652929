"""A session that the command line names: found, compared with a document, loaded or made."""

from __future__ import annotations

import hashlib

from ds_offload.cli.progress import ProgressReport
from ds_offload.errors import InputError
from ds_offload.generator import OffloadedGenerator
from ds_offload.notices import notice
from ds_offload.session import Session
from ds_offload.session_file import SessionWriteError
from ds_offload.session_header import SessionHeader
from ds_offload.session_names import session_path
from ds_offload.session_place import HEADER, check_place, recover


class NamedSession:
    """A session's place on the disk, whether one is there or not.

    Attributes:
        folder: The place.
        header: Of the session that is there; None where there is none yet.
    """

    def __init__(self, name: str, sessions_dir: str | None) -> None:
        """Look at the place; InputError for a wrong name, or where something else is in it."""
        self.folder = session_path(name, sessions_dir)
        recover(self.folder)
        check_place(self.folder)
        self.header = SessionHeader.read(self.folder) if (self.folder / HEADER).is_file() else None

    def check_document(self, document: str | list[int]) -> None:
        """Refuse a document that the session, which is there, is not of.

        Raises:
            InputError: It is of another.
        """
        header = self.header
        assert header is not None
        if isinstance(document, list):
            same = document == header.token_ids[: header.document_tokens]
        else:
            digest = hashlib.sha256(document.encode()).hexdigest()
            same = header.document is not None and digest == header.document.sha256
        if not same:
            raise InputError(
                f"the session {self.folder} is of another document; give --session another name, leave the document "
                "out, or remove the session with `ds-offload session rm`"
            )

    def open(
        self, generator: OffloadedGenerator, document: str | list[int] | None, checkpoint: str | None = None
    ) -> tuple[Session, Exception | None]:
        """The session, loaded, or made of a document; and why it could not be saved, which is no reason to end."""
        if document is None:
            return generator.load_session(self.folder), None
        with ProgressReport(phases=("prefill",)) as progress:
            session = generator.prefill(document, on_progress=progress, checkpoint=checkpoint)
        try:
            session.save(self.folder)
            notice(f"the document is kept as the session {self.folder}")
        except (SessionWriteError, InputError) as error:
            return session, error
        return session, None
