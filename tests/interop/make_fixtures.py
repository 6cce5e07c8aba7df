"""Write tests/peft_fixtures: adapters made by real PEFT, with their inputs and outputs.

    HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 python tests/interop/make_fixtures.py

Every model is tiny and random. A folder of a family (`llama`, `zoo`, `experts_*`) holds

    base/                 the base: `model.safetensors`, and `config.json` where it is a Llama
    base.safetensors      `in.N` and `out.N`: the inputs, and the base's outputs
    CASE/                 the two adapter files, as PEFT wrote them
    CASE/made.safetensors `out.N`: the adapted outputs of the same inputs, and `merged.NAME`: every
                          tensor that differs from the base's after PEFT merged (none: it cannot)

Values are far from the ones that hide a mistake: no factor is zero, alpha is not the rank, no
weight is square, and biases and norms are random too.
"""

import shutil
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parents[1] / "peft_fixtures"

LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
)
LLAMA_CASES = {
    "lora": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3.5, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 9, r"layers\.1\.mlp\.down_proj": 2, "o_proj": 1},
        "alpha_pattern": {"q_proj": 5.5, r"layers\.[02]\.mlp\.up_proj": 1},
    },
    "lora_patterns": {
        "r": 6,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 3, r"layers\.2\.self_attn\.q_proj": 8},
        "alpha_pattern": {r".*\.mlp\..*": 2.5},
    },
    "embedding_and_saved_head": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["embed_tokens", "o_proj"],
        "modules_to_save": ["lm_head"],
    },
    "some_layers": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "tokens": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 7, 60],
    },
    "dora_patterns": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "use_dora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 9, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"q_proj": 5.5},
    },
}

ZOO = {"r": 4, "lora_alpha": 3, "use_rslora": True}
ZOO_CASES = {
    "linear": {**ZOO, "lora_alpha": 1.75, "target_modules": ["proj"]},
    "linear_dora": {**ZOO, "target_modules": ["proj"], "use_dora": True},
    "linear_bias": {**ZOO, "target_modules": ["proj"], "lora_bias": True},
    "bias_lora_only": {**ZOO, "target_modules": ["proj"], "bias": "lora_only"},
    "bias_all": {**ZOO, "target_modules": ["proj"], "bias": "all"},
    "conv1d_hf": {**ZOO, "target_modules": ["mix"], "fan_in_fan_out": True},
    "conv1d_hf_dora": {**ZOO, "target_modules": ["mix"], "fan_in_fan_out": True, "use_dora": True},
    "conv1d": {**ZOO, "target_modules": ["line"]},
    "conv2d": {**ZOO, "target_modules": ["wide", "point"], "rank_pattern": {"point": 2}},
    "conv2d_dora": {**ZOO, "target_modules": ["wide", "point"], "use_dora": True},
    "conv2d_grouped": {**ZOO, "target_modules": ["split"]},
    "embedding": {**ZOO, "target_modules": ["table"]},
    "embedding_dora": {**ZOO, "target_modules": ["table", "proj"], "use_dora": True},
    "modules_to_save": {**ZOO, "target_modules": ["proj"], "modules_to_save": ["head", "norm"]},
}

EXPERTS = {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": []}
EXPERTS_CASES = {
    "both": {**EXPERTS, "target_parameters": ["mlp.gate_up_proj", "mlp.down_proj"]},
    "one": {**EXPERTS, "target_parameters": ["mlp.down_proj"]},
    "router": {**EXPERTS, "target_parameters": ["mlp.router"]},
}


class Zoo(nn.Module):
    """One layer of every kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(13, 6)
        self.proj = nn.Linear(6, 10)
        self.mix = Conv1D(14, 10)
        self.norm = nn.LayerNorm(14)
        self.head = nn.Linear(14, 5)
        self.line = nn.Conv1d(5, 7, 3, padding=1)
        self.wide = nn.Conv2d(3, 8, (3, 5), padding=(1, 2))
        self.point = nn.Conv2d(8, 4, 1)
        self.split = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, ids, image):
        """Tokens [B, T] to [B, 7, T]; an image [B, 3, H, W] to [B, 6, H - 2, W - 2]."""
        text = self.head(self.norm(self.mix(torch.tanh(self.proj(self.table(ids))))))
        return self.line(text.mT), self.split(torch.tanh(self.point(torch.tanh(self.wide(image)))))


class Experts(nn.Module):
    """Expert stacks as parameters: [experts, out, in], or [experts, in, out] if transposed."""

    def __init__(self, is_transposed, experts=3, d=6, wide=8):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (experts, wide, d), (experts, d, wide)
        self.gate_up_proj = nn.Parameter(torch.empty(down if is_transposed else up))
        self.down_proj = nn.Parameter(torch.empty(up if is_transposed else down))
        self.router = nn.Parameter(torch.empty(experts, d))

    def forward(self, x):
        """[B, d] to [B, d], through every expert, weighted by the router."""
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.mT, down.mT
        each = torch.einsum("bef,efd->bed", torch.tanh(torch.einsum("bd,edf->bef", x, up)), down)
        return torch.einsum("be,bed->bd", torch.softmax(x @ self.router.mT, -1), each)


class ExpertsModel(nn.Module):
    """A model whose only layer is `mlp`."""

    def __init__(self, is_transposed):
        super().__init__()
        self.mlp = Experts(is_transposed)

    def forward(self, x):
        """[B, d] to [B, d]."""
        return self.mlp(x)


def randomize(parameters, seed, spread=0.3):
    """Adds noise to every parameter, in place, the same for the same names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(parameters):
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


def new(make):
    """A base model: every parameter random, none of them where its init left it."""
    torch.manual_seed(0)
    model = make().to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    randomize(model.named_parameters(), seed=1)
    model.name_or_path = "tiny-random"
    return model


def call(model, inputs):
    """The model's outputs, as a list of tensors."""
    with torch.no_grad():
        outputs = model(*inputs)
    outputs = outputs.logits if hasattr(outputs, "logits") else outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output.contiguous() for output in outputs]


def numbered(name, tensors):
    """Tensors under `name.0`, `name.1`, ..."""
    return {f"{name}.{k}": tensor for k, tensor in enumerate(tensors)}


def write_base(folder, make, inputs):
    """The base's weights, and what it does to the inputs."""
    model = new(make)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "base")
        (folder / "base" / "generation_config.json").unlink(missing_ok=True)
    else:
        (folder / "base").mkdir(parents=True)
        save_file(model.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
    made = numbered("in", inputs) | numbered("out", call(model, inputs))
    save_file(made, folder / "base.safetensors")


def write_case(folder, make, inputs, settings):
    """One adapter, and what PEFT computes with it."""
    model = get_peft_model(new(make), LoraConfig(**settings)).eval()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trained:
        if "lora_" in name and "magnitude" not in name:
            parameter.data.zero_()  # their own start would depend on PEFT's order of drawing
    randomize(trained, seed=2, spread=0.2)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    made = numbered("out", call(model, inputs)) | merged(model, new(make), inputs)
    save_file(made, folder / "made.safetensors")


def merged(model, base, inputs):
    """The tensors that merging changes, after a check that the merged model is the same."""
    expected = call(model, inputs)
    try:
        model = model.merge_and_unload()
    except NotImplementedError:  # grouped convolutions
        return {}
    for found, wanted in zip(call(model, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    before = base.state_dict()
    return {
        f"merged.{name}": tensor.contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


def families():
    """Every family: its name, how to make the base, the inputs, and the cases."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 61, (2, 9), generator=draw)
    ids[0, :3] = torch.tensor([3, 7, 60])  # the rows that "tokens" replaces
    words = torch.tensor([[0, 3, 12, 5, 7]])
    image = torch.randn(1, 3, 6, 8, generator=draw)
    x = torch.randn(5, 6, generator=draw)
    llama = lambda: LlamaForCausalLM(LLAMA)  # noqa: E731
    cases = {name: {**case, "task_type": "CAUSAL_LM"} for name, case in LLAMA_CASES.items()}
    yield "llama", llama, (ids,), cases
    yield "zoo", Zoo, (words, image), ZOO_CASES
    yield "experts_out_in", lambda: ExpertsModel(False), (x,), EXPERTS_CASES
    yield "experts_in_out", lambda: ExpertsModel(True), (x,), EXPERTS_CASES


def main():
    """Writes everything anew."""
    torch.set_num_threads(1)
    if HERE.exists():
        shutil.rmtree(HERE)
    for family, make, inputs, cases in families():
        write_base(HERE / family, make, inputs)
        for case, settings in cases.items():
            write_case(HERE / family / case, make, inputs, settings)
            gap = gap_of(HERE / family, case)
            print(f"{family}/{case}: outputs move by {gap:.2g}")


def gap_of(folder, case):
    """The largest change of an output, relative to the largest output."""
    before = load_file(folder / "base.safetensors")
    after = load_file(folder / case / "made.safetensors")
    outputs = [name for name in before if name.startswith("out.")]
    return max(float((after[n] - before[n]).abs().max() / after[n].abs().max()) for n in outputs)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
