"""Folders that plain `AutoModelFor….from_pretrained` opens: the transformers plug-in, opening and saving.

Edits travel in `config.json` as `quantization_config = {"quant_method": "secateur", "version": 1, "edits": [...]}`.
Importing secateur registers the plug-in that shapes the empty model by them before transformers reads the weights.
Without the import, transformers finds tensors of other shapes than it expects and refuses the folder. Where no edit
changes a shape, one parameter is stored with one axis more.
"""

from secateur.hub.folders import bytes_on_disk, check_target, given_bytes, save_folder, save_model, write_model
from secateur.hub.opening import open_any, open_model, open_tokenizer
from secateur.hub.plugin import (
    attach,
    carry_edits,
    edits_of,
)

__all__ = [
    "attach",
    "bytes_on_disk",
    "carry_edits",
    "check_target",
    "edits_of",
    "given_bytes",
    "open_any",
    "open_model",
    "open_tokenizer",
    "save_folder",
    "save_model",
    "write_model",
]
