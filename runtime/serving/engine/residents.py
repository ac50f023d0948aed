"""The adapters that live in one model, one active at a time, through peft.

Knows peft and module trees; does not know requests. Start at `Residents.activate`.
"""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ConfigError, UnknownModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Residents:
    """A base model with any number of adapters of any rank; `model` is what is called."""

    def __init__(self, base: "PreTrainedModel") -> None:
        self.model: Any = base
        self._base = base
        self._inside: dict[str, str] = {}
        self._numbers = itertools.count()
        self._active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that may be activated."""
        return tuple(self._inside)

    def add(self, name: str, folder: Path, *, strength: float) -> None:
        """Read the adapter in `folder`; ConfigError when it does not fit the base model."""
        from peft import PeftConfig, PeftModel
        from peft.tuners.lora import LoraLayer

        # peft keeps adapters under module names, which hold no dots: a user's name does
        inside = f"adapter{next(self._numbers)}"
        try:
            if self.model is self._base:
                shape = PeftConfig.from_pretrained(str(folder))
                self.model = PeftModel(self._base, shape, adapter_name=inside)
            self.model.load_adapter(str(folder), adapter_name=inside)
        except (ValueError, RuntimeError, KeyError) as error:
            self._take_out(inside)
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"adapter {name}: does not fit this model: {reason}") from error
        finally:
            self._active = "unknown"
        for module in self.model.modules():
            if isinstance(module, LoraLayer) and inside in module.scaling:
                module.scaling[inside] *= strength
        self.model.requires_grad_(False)
        self._inside[name] = inside

    def remove(self, name: str) -> None:
        """Forget an adapter that nobody uses any more."""
        self._take_out(self._inside.pop(name))

    def activate(self, name: str | None) -> None:
        """Make the next forward pass that of `name`, or of the base for None."""
        if self._active == name:
            return
        if name is None:
            if self._inside:
                self.model.base_model.disable_adapter_layers()
        elif name in self._inside:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._inside[name], inference_mode=True)
        else:
            raise UnknownModelError(f"adapter '{name}' is not resident")
        self._active = name

    def _take_out(self, inside: str) -> None:
        self._active = "unknown"
        if self.model is self._base or inside not in self.model.peft_config:
            return
        if len(self.model.peft_config) > 1:
            self.model.delete_adapter(inside)
        else:
            self.model = self.model.unload()
