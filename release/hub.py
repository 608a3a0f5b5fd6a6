"""The Hugging Face Hub: uploading a release, and fetching a model that is to be imported."""
import re
from pathlib import Path

from common import UserError, columns, quoted
from runfolder import BUNDLE, LOGS

# Files of an older release, which a new one replaces or removes: they are about other weights. Names that others use
# for files of their own, such as model.py, are not among them
OURS = ("model.safetensors", "pytorch_model.bin", "step_*.pt", "*.gguf", "Modelfile", "chat_template.jinja",
        "ivme_base_ema.pt", "ivme_instruct_ema.pt", "ivme_tokenizer.json", "eval.json", *LOGS, *BUNDLE)
# What is fetched of a model, beside its weights
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def connect():
    """The Hub's client, without progress bars."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars
    disable_progress_bars()
    return HfApi()


def push(folder, name):
    """Uploads a folder to the model USER/NAME, which is made if there is none, after showing what it uploads.

    Raises UserError if the Hub does not take it. The folder stays as it is.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    print(f"uploading to {name}, {sum(sizes) / 1e6:,.1f} MB:")
    lines = columns([(str(path.relative_to(folder)), f"{n:>14,} bytes") for path, n in zip(files, sizes)])
    print("\n".join(f"  {line}" for line in lines), flush=True)

    api, log_in = connect(), "log in with a token that may write: hf auth login, or HF_TOKEN"
    again = f"then python export.py --out={quoted(folder)} --push={name} uploads it"
    try:
        api.create_repo(name, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Release of {name}",
                                 delete_patterns=OURS)  # those of an older release; what is uploaded now stays
    except LocalTokenNotFoundError:
        raise UserError(f"you are not logged in to the Hub; {log_in}; {again}") from None
    except HfHubHTTPError as e:
        if getattr(e.response, "status_code", None) in (401, 403):
            raise UserError(f"the Hub does not let you write to {name}; {log_in}; {again}") from None
        raise UserError(f"the Hub does not take {name} ({short(e)}); {again}") from None
    except Exception as e:  # the HTTP library raises many types
        raise UserError(f"the Hub cannot be reached ({short(e)}); {again}") from None
    print(f"uploaded: {done.commit_url}")


def fetch(name):
    """A folder with the files of a model of the Hub that can be imported. UserError if the Hub has no such model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    api = connect()
    try:
        info = api.model_info(name, timeout=8)
        there = [file.rfilename for file in info.siblings]
        weights = [file for file in there if re.fullmatch(r"model[\w-]*\.safetensors(\.index\.json)?", file)]
        wanted = [file for file in TEXT_FILES if file in there] + (weights or ["pytorch_model.bin"])
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))
    except GatedRepoError:
        raise UserError(f"{name} is on the Hub for those who accept its terms: do so on its page, then log in with "
                        "hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError(f"there is no folder {name} here, and no public model of this name on the Hub") from None
    except Exception as e:  # the Hub's client and its HTTP library raise many types
        raise UserError(f"there is no folder {name} here, and the Hub does not give a model of this name ({short(e)})"
                        ) from None


def short(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
