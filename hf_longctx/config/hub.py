"""A config in a repository of the Hugging Face Hub: one file ``longctx.yaml``, read as data, pinned to its commit."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError
from . import strict_yaml
from .card import model_card
from .checks import short, wrong
from .config import LongCtxConfig, checked
from .files import read_file
from .paths import refuse_paths

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

FILE = "longctx.yaml"
CARD = "README.md"
PIN = "hub"  # key of heads.source: repository and commit, in the form that is a name itself
PART = r"[A-Za-z0-9_][\w.-]{0,95}"
REVISION = r"(?!/)(?:(?!\.\.)[^\s@\\]){1,200}"  # which the client makes a path in its cache of
NAME = re.compile(rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>{REVISION}))?", re.A)
COMMIT = re.compile(r"[0-9a-f]{40}")

log = logging.getLogger(__name__)


class Repository(NamedTuple):
    """A repository, and the branch, tag or commit of it; None for its main branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def repository(name: str) -> Repository | None:
    """What ``user/repo`` or ``user/repo@revision`` names; None for a text of another form, or an embedded model."""
    from ..assets import OWNER  # which only a name with a / in it needs

    match = NAME.fullmatch(name)
    if match is None or name.startswith(f"{OWNER}/"):
        return None
    return Repository(match["repo"], match["revision"])


def load(wanted: Repository, where: str = "config", hint: str = "") -> LongCtxConfig:
    """The config of a repository's ``longctx.yaml``; ``heads.source.hub`` says which commit it is of.

    Args:
        where: what the error of a repository that cannot be read starts with.
        hint: what the error of one that does not exist ends with.

    Raises:
        ConfigError: no such repository, revision or file, one that asks for a login, no network, or a file that is
            too large, wrong, or names a path.
    """
    path = _fetch(wanted, f"{where}: {str(wanted)!r}", hint)
    pinned = f"{wanted.repo}@{path.parent.name}"  # the cache keeps a file under its commit
    said = f"{pinned}: {FILE}"
    config = checked(read_file(path, said), said)
    refuse_paths(config, said, "comes from the Hub")
    log.info("config %s: read from %s", wanted, path)
    return config.override(heads={"source": {PIN: pinned}})


def push(config: LongCtxConfig, repo_id: str, *, revision: str | None, token: Any, **commit: Any) -> CommitInfo:
    """Upload a config and, where there is none yet, a model card; see ``LongCtxConfig.push_to_hub``."""
    from huggingface_hub import CommitOperationAdd, HfApi

    if commit["create_pr"] and revision not in (None, "main"):
        raise wrong("revision", revision, "none of it with create_pr: a pull request goes to the main branch")
    refuse_paths(config, "push_to_hub", "is on the Hub")
    text = config.to_text()
    strict_yaml.check_size(len(text.encode()), "push_to_hub")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=commit.pop("private"), exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = {FILE: text}
    if not api.file_exists(repo_id, CARD, revision=revision):
        files[CARD] = model_card(config, repo_id)
    added = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    return api.create_commit(repo_id, added, revision=revision, **commit)


def _fetch(wanted: Repository, said: str, hint: str) -> Path:
    """The file in the client's cache, brought there where it is not: one question about its size, one fetch.

    A commit that is in the cache asks nobody, and what is in the cache serves where the Hub gives no answer.
    """
    import huggingface_hub
    from huggingface_hub import errors

    form = {"repo_id": wanted.repo, "filename": FILE, "revision": wanted.revision}
    cached = None
    try:
        cached = huggingface_hub.try_to_load_from_cache(**form)
        if isinstance(cached, str) and COMMIT.fullmatch(wanted.revision or ""):
            return Path(cached)
        url = huggingface_hub.hf_hub_url(**form)
        size = huggingface_hub.get_hf_file_metadata(url).size  # the download itself would try six times without network
        strict_yaml.check_size(size or 0, f"{wanted}: {FILE}")
        return Path(huggingface_hub.hf_hub_download(**form))
    except ConfigError:
        raise
    except (OSError, ValueError, errors.HTTPError) as error:
        gone = isinstance(error, (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError))
        if isinstance(cached, str) and not gone:
            log.info("%s: the Hub gives no answer, what was fetched before is read", wanted)
            return Path(cached)
        raise ConfigError(f"{said} {_reason(error, wanted, hint)}") from None


def _reason(error: Exception, wanted: Repository, hint: str) -> str:
    """Why nothing was read, and what to do."""
    from huggingface_hub import errors

    first = (str(error).splitlines() or [type(error).__name__])[0]
    measure = (
        f"Where it is a model, measure its heads: hf-longctx identify {wanted.repo} --out my.yaml (and give "
        f"the map away: --share FILE --licence LICENCE).{hint}"
    )
    none = f"is no shipped config and no id that one lists; its {FILE} was not fetched before, and"
    no_answer = (errors.HTTPError, errors.LocalEntryNotFoundError, errors.FileMetadataError, ConnectionError)
    for kind, reason in (
        (
            errors.GatedRepoError,
            f"is gated on the Hub: accept its conditions at its page, and log in (hf auth login).{hint}",
        ),
        (
            errors.RepositoryNotFoundError,
            "is no shipped config, no id that one lists, and no repository of the Hub, or a private one: log in (hf "
            f"auth login). `hf-longctx configs` lists the shipped configs, `hf-longctx identify` makes one.{hint}",
        ),
        (
            errors.RevisionNotFoundError,
            f"names a repository of the Hub that has no branch, tag or commit {short(wanted.revision)}.",
        ),
        (errors.RemoteEntryNotFoundError, f"is a repository of the Hub without a {FILE}. {measure}"),
        (errors.OfflineModeIsEnabled, f"{none} HF_HUB_OFFLINE forbids to ask the Hub. {measure}"),
        (no_answer, f"{none} the Hub gives no answer: {first}. {measure}"),
        (ValueError, f"is no name that a repository of the Hub can have: {first}{hint}"),
    ):
        if isinstance(error, kind):
            return reason
    return f"has a {FILE} that the cache of the Hub's client has no place for: {first}."
