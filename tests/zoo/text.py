"""Text: encoders, decoders, and models that read one text and write another."""

from __future__ import annotations

from tests.zoo.architectures import GROUPED, SMALL, TEXT, Row, floors, ids, masked, seq2seq

BOTH = {**SMALL, **TEXT}
GPT = {
    "vocab_size": 96,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BART = {
    **TEXT,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
T5 = {**T5, "decoder_start_token_id": 2, "pad_token_id": 2, "eos_token_id": 1}
#: Attention that does not divide by the root of its width leaves that to the weights of the queries.
UNSCALED = {"*.q.weight": 0.15}

ENCODERS = {
    "bert": Row("BertForMaskedLM", BOTH, masked),
    "roberta": Row("RobertaForSequenceClassification", BOTH, masked),
    "distilbert": Row(
        "DistilBertForMaskedLM",
        {"vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
        masked,
    ),
    "albert": Row("AlbertForMaskedLM", {**BOTH, "embedding_size": 32}, masked),
    "electra": Row("ElectraForPreTraining", {**BOTH, "embedding_size": 32}, masked, floors=floors(25, 25, 29, 6, 4)),
    "mpnet": Row("MPNetForMaskedLM", BOTH, masked),
    "deberta_v2": Row(
        "DebertaV2ForMaskedLM",
        {**BOTH, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        masked,
    ),
    "modernbert": Row(
        "ModernBertForMaskedLM", {**BOTH, "local_attention": 8, "cls_token_id": 3, "sep_token_id": 4}, masked
    ),
    "fnet": Row("FNetForMaskedLM", {**SMALL, **TEXT}, ids),
    "roformer": Row("RoFormerForMaskedLM", {**BOTH, "embedding_size": 64}, masked),
    "squeezebert": Row("SqueezeBertForMaskedLM", {**BOTH, "embedding_size": 64}, masked),
    "convbert": Row("ConvBertForMaskedLM", {**BOTH, "embedding_size": 64}, masked),
    "mobilebert": Row(
        "MobileBertForMaskedLM",
        {**BOTH, "embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
        masked,
    ),
    "longformer": Row("LongformerForMaskedLM", {**BOTH, "attention_window": 4}, masked),
    "xlnet": Row("XLNetLMHeadModel", {"vocab_size": 96, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}, ids),
    "canine": Row(
        "CanineModel", {**BOTH, "num_hash_functions": 2, "num_hash_buckets": 50, "downsampling_rate": 4}, masked
    ),
    "perceiver": Row(
        "PerceiverForMaskedLM",
        {
            "num_latents": 8,
            "d_latents": 64,
            "d_model": 32,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 32,
            "v_channels": 64,
            "vocab_size": 96,
            "max_position_embeddings": 12,
        },
        masked,
    ),
}

DECODERS = {
    "gpt2": Row("GPT2LMHeadModel", GPT, masked, generates=True),
    "gpt_neo": Row(
        "GPTNeoForCausalLM",
        {
            **TEXT,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        masked,
        generates=True,
    ),
    "gpt_neox": Row("GPTNeoXForCausalLM", BOTH, masked, generates=True),
    "gptj": Row("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, masked, generates=True),
    "opt": Row("OPTForCausalLM", {**TEXT, **SMALL, "ffn_dim": 128, "word_embed_proj_dim": 32}, masked, generates=True),
    "bloom": Row(
        "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}, masked, generates=True
    ),
    "falcon": Row("FalconForCausalLM", {**TEXT, **SMALL, "ffn_hidden_size": 128}, masked, generates=True),
    "llama": Row("LlamaForCausalLM", GROUPED, masked, generates=True),
    "mistral": Row("MistralForCausalLM", {**GROUPED, "sliding_window": 4}, masked, generates=True),
    "qwen2": Row("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}, masked, generates=True),
    "qwen3": Row("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}, masked, generates=True),
    "gemma2": Row("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16}, masked, generates=True),
    "gemma3": Row("Gemma3ForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 8}, masked, generates=True),
    "phi": Row("PhiForCausalLM", BOTH, masked, generates=True),
    "phi3": Row("Phi3ForCausalLM", GROUPED, masked, generates=True),
    "stablelm": Row("StableLmForCausalLM", GROUPED, masked, generates=True),
    "olmo2": Row("Olmo2ForCausalLM", GROUPED, masked, generates=True),
    "cohere": Row("CohereForCausalLM", GROUPED, masked, generates=True),
    "granite": Row("GraniteForCausalLM", GROUPED, masked, generates=True),
    "starcoder2": Row("Starcoder2ForCausalLM", GROUPED, masked, generates=True),
    "mpt": Row(
        "MptForCausalLM",
        {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
        masked,
        generates=True,
    ),
    "nemotron": Row("NemotronForCausalLM", {**GROUPED, "head_dim": 16}, masked, generates=True),
    "smollm3": Row("SmolLM3ForCausalLM", GROUPED, masked, generates=True),
    "glm4": Row("Glm4ForCausalLM", {**GROUPED, "head_dim": 16}, masked, generates=True),
    "biogpt": Row("BioGptForCausalLM", BOTH, masked, generates=True),
    "codegen": Row("CodeGenForCausalLM", {**GPT, "n_ctx": 64, "rotary_dim": 8}, masked, generates=True),
}

PAIRS = {
    "t5": Row("T5ForConditionalGeneration", T5, seq2seq, generates=True, gains=UNSCALED),
    "umt5": Row(
        "UMT5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu"},
        seq2seq,
        generates=True,
        gains=UNSCALED,
        floors=floors(25, 25, 28, 7, 6),
    ),
    "bart": Row("BartForConditionalGeneration", BART, seq2seq, generates=True),
    "pegasus": Row("PegasusForConditionalGeneration", BART, seq2seq, generates=True),
    "marian": Row("MarianMTModel", BART, seq2seq, generates=True),
    "m2m_100": Row("M2M100ForConditionalGeneration", BART, seq2seq, generates=True),
    "led": Row(
        "LEDForConditionalGeneration",
        {**BART, "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        seq2seq,
        generates=True,
    ),
}
