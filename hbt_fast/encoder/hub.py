"""Where a checkpoint is: in a folder of this machine, or by a name on the Hugging Face hub and in its cache.

A hub that is out of reach is found out with one request. Left to themselves, the libraries try six times for every file
of every part of a checkpoint, for minutes, and then report that the file is not there.
"""

from __future__ import annotations

import difflib
import os
import sys
from functools import lru_cache
from pathlib import Path

from hbt_fast.encoder.model import EncoderError

PATIENCE = 5.0  # seconds that the hub has for its first answer
FIRST_READ = ("config.json", "adapter_config.json", "modules.json")  # one of which every checkpoint has
LIKE = 0.6  # of difflib's ratio: names that may be meant


def cache_only(name: str) -> bool:
    """Whether a checkpoint's files are looked for on this machine alone: in a folder, or where no hub can be asked.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: no folder, and no name that the hub knows; or the hub cannot be asked, and its cache has no such
            name. What is written like a path is never asked for there.
    """
    if os.path.isdir(name):
        return True
    _refuse_paths(name)
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif why := _out_of_reach(name):
        why = f"the hub is out of reach: {why}"
    if why and not in_cache(name):
        _out_of_reach.cache_clear()  # the next try may go well
        raise EncoderError(
            f"{name}: no such folder, and as a hub name it is not in the cache ({why}); give a checkpoint folder, or "
            f"run `hf download {name}` where the hub can be reached{_meant(name)}"
        )
    return bool(why)


def in_cache(name: str) -> bool:
    """Whether the hub's cache on this machine has a checkpoint of this name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in FIRST_READ)
    except HFValidationError:
        return False


@lru_cache
def _out_of_reach(name: str) -> str:
    """Why the hub does not answer; "" if it does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        answer = get_hf_file_metadata(hf_hub_url(name, FIRST_READ[0]), timeout=PATIENCE)
        why = "" if answer.commit_hash else "something else answers in its place (a proxy, a login page)"
    except GatedRepoError:
        why = ""  # its card may be read; transformers says what to do about the rest
    except RepositoryNotFoundError:
        if in_cache(name):
            return "it has no such model any more, or not for this login"
        raise EncoderError(
            f"{name}: no such folder, and no such model on the hub (a private one needs `hf auth login`){_meant(name)}"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = f"it answers with status {status}" if status >= 500 else ""
    except Exception as error:  # whatever the HTTP library of the installed huggingface_hub raises
        why = str(error) or type(error).__name__
    if why and in_cache(name):
        print(f"{name}: taken from the cache; the hub is out of reach: {why}", file=sys.stderr)
    return why


def _refuse_paths(name: str) -> None:
    """Refuse what is written like a path, is none of a folder and would be asked for on the hub in vain."""
    if os.path.exists(name):
        raise EncoderError(f"{name} is a file; give the folder that it is in: {os.path.dirname(name) or '.'}")
    parts = name.split("/")
    path = name.startswith((".", "/", "~")) or len(parts) > 2 or "" in parts or not can_be_on_the_hub(name)
    if path or (len(parts) == 2 and os.path.isdir(parts[0]) and not in_cache(name)):
        raise EncoderError(
            f"{name}: no such folder; give a checkpoint folder or a hub name such as xlm-roberta-base{_meant(name)}"
        )


def can_be_on_the_hub(name: str) -> bool:
    """Whether it is a name as the hub has them, and no absolute path, say."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _meant(name: str) -> str:
    """What to add to a message: the folder that is named most like it."""
    path = Path(os.path.expanduser(name))
    known = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if not os.path.isdir(known / part):
            try:
                folders = [one.name for one in known.iterdir() if one.is_dir()]
            except (OSError, ValueError):
                folders = []
            near = difflib.get_close_matches(part, folders, 1, LIKE)
            if not near:
                return f"; there is {known}, and nothing like {part} in it" if known.parts[path.is_absolute() :] else ""
            part = near[0]
        known /= part
    return f"; did you mean {known}?" if name else ""
