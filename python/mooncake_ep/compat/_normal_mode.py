"""What DeepEP has for its normal mode, as far as clients touch it before they choose a mode.

There is no normal mode here: what tunes it is taken, and what it does says what to use instead.
"""

from __future__ import annotations

from typing import Any, NoReturn

from . import _checks as check


class Config:
    """How DeepEP's normal mode would share a GPU; nothing here looks at it.

    Attributes:
        num_sms, num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens,
        num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens: as given.
    """

    num_sms: int
    num_max_nvl_chunked_send_tokens: int
    num_max_nvl_chunked_recv_tokens: int
    num_max_rdma_chunked_send_tokens: int
    num_max_rdma_chunked_recv_tokens: int

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        """Note them. TypeError or ValueError if one is no integer, or negative."""
        numbers = {
            "num_sms": num_sms,
            "num_max_nvl_chunked_send_tokens": num_max_nvl_chunked_send_tokens,
            "num_max_nvl_chunked_recv_tokens": num_max_nvl_chunked_recv_tokens,
            "num_max_rdma_chunked_send_tokens": num_max_rdma_chunked_send_tokens,
            "num_max_rdma_chunked_recv_tokens": num_max_rdma_chunked_recv_tokens,
        }
        for name, value in numbers.items():
            setattr(self, name, check.integer(name, value, 0))

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return 0, the bytes of num_nvl_bytes that are needed here."""
        check.integer("hidden_bytes", hidden_bytes, 0)
        check.integer("num_ranks", num_ranks)
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return 0, the bytes of num_rdma_bytes that are needed here."""
        return self.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)


class NormalMode:
    """The methods of Buffer that are of the normal mode: signatures, because clients look at them.

    Those that exchange tokens raise NotImplementedError.
    """

    num_sms: int = 20

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return a Config; DeepEP's is tuned for so many ranks."""
        check.integer("num_ranks", num_ranks)
        return Config(NormalMode.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return a Config; DeepEP's is tuned for so many ranks."""
        return NormalMode.get_dispatch_config(num_ranks)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Note a number that clients set; low-latency mode has no such limit."""
        NormalMode.num_sms = check.integer("new_num_sms", new_num_sms)

    def get_dispatch_layout(
        self,
        topk_idx: Any,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> NoReturn:
        """Say what to use instead."""
        _refuse("get_dispatch_layout", "low_latency_dispatch(), which needs no layout")

    def dispatch(
        self,
        x: Any,
        handle: Any = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> NoReturn:
        """Say what to use instead."""
        _refuse("dispatch", "low_latency_dispatch()")

    def combine(
        self,
        x: Any,
        handle: Any,
        topk_weights: Any = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> NoReturn:
        """Say what to use instead."""
        _refuse("combine", "low_latency_combine()")


def refuse_constructor() -> NoReturn:
    """Say how to get a Buffer that there is."""
    raise NotImplementedError(
        "low_latency_mode is False, and there is no normal mode: give low_latency_mode=True "
        "(SGLang: --deepep-mode low_latency; vLLM: --all2all-backend deepep_low_latency)"
    )


def _refuse(name: str, instead: str) -> NoReturn:
    raise NotImplementedError(
        f"Buffer.{name}() is of DeepEP's normal mode, which is not here: use {instead}"
    )
