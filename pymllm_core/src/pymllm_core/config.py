"""Settings: one pydantic model for flags, environment, TOML file and keyword arguments.

Flags are ``--section.field``. Precedence: flags, environment (``PYMLLM_SERVER__PORT``), the TOML file
(``--config FILE`` or ``PYMLLM_CONFIG``), defaults. A setting either works, or is refused with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from typing_extensions import Self

DType = Literal["auto", "float16", "bfloat16", "float32"]
KvDType = Literal["auto", "float16", "bfloat16", "float32", "fp8_e4m3", "fp8_e5m2"]


class Section(BaseModel):
    """A frozen section that knows no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ServerSettings(Section):
    """Everything under ``--server.``: the model, memory, scheduling, backends, HTTP and logs."""

    # Model
    model_path: str = Field(description="folder, `demo`, Hugging Face id or modelscope:ORG/NAME")
    tokenizer_path: str | None = Field(None, description="as model_path; default: the model's own")
    tokenizer_mode: Literal["auto", "slow", "fast"] = Field("auto", description="tokenizer implementation")
    load_format: Literal["auto", "safetensors", "dummy"] = Field(
        "auto", description="dummy: seeded random weights, config.json is enough"
    )
    trust_remote_code: bool = Field(False, description="run tokenizer code shipped with the checkpoint")
    download_dir: Path | None = Field(
        None, description="where downloaded models go; default: the hub's cache"
    )
    context_length: int | None = Field(None, ge=1, description="longest prompt plus answer, in tokens")
    dtype: DType = Field("auto", description="computation; auto: the checkpoint's, as the device allows")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one")
    # HTTP
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(30000, ge=1, le=65535, description="port to listen on")
    fastapi_root_path: str = Field("", description="path prefix added by a reverse proxy")
    api_key: SecretStr | None = Field(None, description="key that clients must send as a bearer token")
    admin_api_key: SecretStr | None = Field(None, description="key for administration")
    served_model_name: str | None = Field(None, description="name in the API; default: model_path")
    file_storage_path: Path | None = Field(None, description="refused: no route stores files")
    cors_allow_origins: tuple[str, ...] = Field((), description="origins that browsers may call from")
    # Memory and scheduling
    mem_fraction_static: float | None = Field(
        None, gt=0, lt=1, description="share of the device's free memory for weights and KV"
    )
    max_running_requests: int | None = Field(None, ge=1, description="sequences decoded together")
    max_queued_requests: int | None = Field(None, ge=0, description="waiting requests before 429")
    max_total_tokens: int | None = Field(None, ge=1, description="capacity of the KV pool in tokens")
    chunked_prefill_size: int | None = Field(
        None, ge=1, description="most prompt tokens of one sequence a round"
    )
    max_prefill_tokens: int | None = Field(None, ge=1, description="most prompt tokens of one round")
    schedule_policy: Literal["auto", "fcfs"] = Field("auto", description="order of admission")
    schedule_conservativeness: float = Field(
        1.0, gt=0, description="pages kept free for each running sequence before a new one is admitted"
    )
    sleep_on_idle: bool | None = Field(
        None, description="the engine always sleeps when idle; false is refused"
    )
    stream_interval: int = Field(1, ge=1, description="tokens between two streamed deltas")
    stream_output: bool = Field(True, description="/generate streams new text; false: the text so far")
    # Backends
    engine_process: Literal["auto", "on", "off"] = Field(
        "auto", description="serve with the engine in a process of its own; auto: where the device is CUDA"
    )
    base_gpu_id: int = Field(0, ge=0, description="CUDA device index")
    attention_backend: str = Field("auto", description="auto or a backend's name (see `pymllm plugins`)")
    gdn_decode_backend: str = Field("auto", description="for models with gated delta-net layers")
    gdn_extend_backend: str = Field("auto", description="for models with gated delta-net layers")
    sampling_backend: Literal["auto", "pytorch"] | None = Field(None, description="sampler implementation")
    disable_cuda_graph: bool = Field(False, description="do not capture decode steps")
    enable_torch_compile: bool = Field(False, description="refused: kernels are fused already")
    torch_compile_max_bs: int | None = Field(None, ge=1, description="refused with enable_torch_compile")
    random_seed: int = Field(42, description="for dummy weights and for requests without a seed")
    # Output
    reasoning_parser: str | None = Field(
        None, description="default: the model family's; `none` switches it off"
    )
    tool_call_parser: str | None = Field(
        None, description="default: the model family's; `none` switches it off"
    )
    # Logs
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        "info", description="verbosity"
    )
    enable_metrics: bool = Field(False, description="serve Prometheus metrics at /metrics")
    show_time_cost: bool = Field(False, description="log the timings of each finished request")
    enable_debug_timing: bool = Field(False, description="add debug_timing to answers")
    decode_log_interval: int = Field(
        40, ge=1, description="decode steps between two progress lines in the log"
    )
    # Cache and IPC
    disable_radix_cache: bool = Field(False, description="share no prefixes (chunk cache)")
    radix_cache_page_size: int = Field(16, ge=1, description="tokens in one KV page, the unit of sharing")
    enable_mamba_cache: bool = Field(False, description="for models with state-space layers")
    enable_shared_queue: bool = Field(False, description="refused: no tensor crosses processes")
    tensor_transport_mode: Literal["default", "cuda_ipc", "cuda_ipc_pool"] = Field(
        "default", description="others are refused: no tensor crosses processes"
    )
    cuda_ipc_pool_size_mb: int | None = Field(None, ge=1, description="refused with tensor_transport_mode")
    cuda_ipc_recycle_interval: float | None = Field(
        None, gt=0, description="refused with tensor_transport_mode"
    )
    extra_options: dict[str, Any] = Field(
        default_factory=dict, description="refused unless a plugin reads them"
    )

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        """Flags of the original whose machinery does not exist here say so instead of doing nothing."""
        refused = {
            "file_storage_path": (self.file_storage_path, "no route stores files"),
            "sleep_on_idle=false": (self.sleep_on_idle is False, "the engine never busy-waits"),
            "enable_torch_compile": (
                self.enable_torch_compile,
                "decode steps are fused kernels, and compiling would add minutes to the start",
            ),
            "torch_compile_max_bs": (self.torch_compile_max_bs, "enable_torch_compile is not offered"),
            "enable_shared_queue": (self.enable_shared_queue, "no tensor crosses processes"),
            "tensor_transport_mode": (
                self.tensor_transport_mode != "default",
                "no tensor crosses processes",
            ),
            "cuda_ipc_pool_size_mb": (self.cuda_ipc_pool_size_mb, "no tensor crosses processes"),
            "cuda_ipc_recycle_interval": (self.cuda_ipc_recycle_interval, "no tensor crosses processes"),
            "extra_options": (self.extra_options, "no installed part reads extra options"),
        }
        for flag, (given, why) in refused.items():
            if given:
                raise ValueError(f"--server.{flag} is refused: {why}; remove it")
        return self

    @property
    def public_name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or self.model_path


class QuantizationSettings(Section):
    """Everything under ``--quantization.``."""

    method: str | None = Field(None, description="default: what the checkpoint's quantization_config says")
    kv_cache_dtype: KvDType = Field("auto", description="auto: the computation's dtype")
    lm_head: Literal["stored", "int8"] = Field(
        "stored", description="int8: round the output head to 8 bits at loading, half the bytes of bf16"
    )


class Settings(Section):
    """All settings, complete and validated."""

    server: ServerSettings
    quantization: QuantizationSettings = QuantizationSettings()

    @classmethod
    def of(cls, model_path: str, **server: Any) -> Settings:
        """Settings from keyword arguments; ``quantization``, ``kv_cache_dtype`` and ``lm_head`` name that section's."""
        sources = (
            ("quantization", "method"),
            ("kv_cache_dtype", "kv_cache_dtype"),
            ("lm_head", "lm_head"),
        )
        quantization = {target: server.pop(source) for source, target in sources if source in server}
        return cls(
            server=ServerSettings(model_path=model_path, **server),
            quantization=QuantizationSettings(**quantization),
        )
