"""Mixtures of experts, and models with a state of their own: state spaces, linear attention, hybrids."""

from __future__ import annotations

from tests.zoo.architectures import GROUPED, TEXT, Row, floors, ids, masked, seq2seq
from tests.zoo.text import T5

EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

#: Answers that move more than others with what their layers err.
SENSITIVE = floors(20, 20, 24, 4, 4)

MIXTURES = {
    "mixtral": Row("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, masked, generates=True, jumps=True),
    "qwen2_moe": Row(
        "Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 64}, masked, generates=True, jumps=True
    ),
    "qwen3_moe": Row("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 16}, masked, generates=True, jumps=True),
    "olmoe": Row("OlmoeForCausalLM", EXPERTS, masked, generates=True, jumps=True),
    "granitemoe": Row("GraniteMoeForCausalLM", {**GROUPED, "num_local_experts": 4}, masked, generates=True, jumps=True),
    "phimoe": Row("PhimoeForCausalLM", {**GROUPED, "num_local_experts": 4}, masked, generates=True, jumps=True),
    "gpt_oss": Row(
        "GptOssForCausalLM", {**GROUPED, "num_local_experts": 4, "head_dim": 16}, masked, generates=True, jumps=True
    ),
    "deepseek_v3": Row(
        "DeepseekV3ForCausalLM",
        {
            **GROUPED,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        masked,
        generates=True,
        jumps=True,
    ),
    "jetmoe": Row(
        "JetMoeForCausalLM",
        {**GROUPED, "kv_channels": 16, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        masked,
        generates=True,
        jumps=True,
    ),
    "ernie4_5_moe": Row(
        "Ernie4_5_MoeForCausalLM",
        {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
        masked,
        generates=True,
        jumps=True,
    ),
    "llama4": Row(
        "Llama4ForCausalLM",
        {**GROUPED, "head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 128, "attention_chunk_size": 8},
        masked,
        generates=True,
        jumps=True,
    ),
    "switch_transformers": Row(
        "SwitchTransformersForConditionalGeneration",
        {
            **T5,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 2,
        },
        seq2seq,
        generates=True,
        jumps=True,
        gains={"*.q.weight": 0.35},
    ),
}

STATES = {
    "mamba": Row(
        "MambaForCausalLM", {**TEXT, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, ids, generates=True
    ),
    "falcon_mamba": Row(
        "FalconMambaForCausalLM",
        {**TEXT, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        ids,
        generates=True,
        floors=SENSITIVE,
    ),
    "mamba2": Row(
        "Mamba2ForCausalLM",
        {
            **TEXT,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
        ids,
        generates=True,
    ),
    "rwkv": Row(
        "RwkvForCausalLM",
        {**TEXT, "hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64, "context_length": 64},
        ids,
        generates=True,
    ),
    "jamba": Row(
        "JambaForCausalLM",
        {
            **GROUPED,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        masked,
        generates=True,
        jumps=True,
    ),
    "bamba": Row(
        "BambaForCausalLM",
        {
            **GROUPED,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
        },
        masked,
        generates=True,
    ),
    "zamba2": Row(
        "Zamba2ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "mamba", "hybrid"],
            "hybrid_layer_ids": [2],
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
        },
        masked,
        generates=True,
        floors=SENSITIVE,
    ),
    "recurrent_gemma": Row(
        "RecurrentGemmaForCausalLM",
        {**GROUPED, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8},
        masked,
        generates=True,
    ),
    "lfm2": Row(
        "Lfm2ForCausalLM",
        {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        masked,
        generates=True,
    ),
    "nemotron_h": Row(
        "NemotronHForCausalLM",
        {
            **GROUPED,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "head_dim": 16,
        },
        masked,
        generates=True,
    ),
    "granitemoehybrid": Row(
        "GraniteMoeHybridForCausalLM",
        {
            **GROUPED,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
        },
        masked,
        generates=True,
        jumps=True,
    ),
    "qwen3_next": Row(
        "Qwen3NextForCausalLM",
        {
            **EXPERTS,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
        masked,
        generates=True,
        jumps=True,
    ),
    "qwen3_5": Row(
        "Qwen3_5ForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        masked,
        generates=True,
    ),
    "falcon_h1": Row(
        "FalconH1ForCausalLM",
        {
            **GROUPED,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
            "head_dim": 16,
        },
        masked,
        generates=True,
    ),
}
