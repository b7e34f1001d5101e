"""Sound, and rows of numbers over time."""

from __future__ import annotations

from tests.zoo.architectures import SMALL, Inputs, Row, sound, tokens, wave

WAV2VEC2 = {
    **SMALL,
    "vocab_size": 32,
    "conv_dim": [32, 32, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "output_hidden_size": 64,
}


def whisper_inputs() -> Inputs:
    return {"input_features": wave(2, 16, 40), "decoder_input_ids": tokens(2, 6)}


def features(length: int, size: int) -> Inputs:
    return {"input_features": wave(2, length, size)}


SOUNDS = {
    "whisper": Row(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 96,
            "num_mel_bins": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "d_model": 64,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "decoder_start_token_id": 0,
        },
        whisper_inputs,
    ),
    "wav2vec2": Row("Wav2Vec2ForCTC", WAV2VEC2, sound()),
    "hubert": Row("HubertModel", WAV2VEC2, sound()),
    "wavlm": Row("WavLMModel", WAV2VEC2, sound()),
    "sew": Row("SEWModel", {**WAV2VEC2, "squeeze_factor": 2}, sound()),
    "wav2vec2_bert": Row(
        "Wav2Vec2BertModel",
        {**SMALL, "feature_projection_input_dim": 32, "conv_depthwise_kernel_size": 5},
        lambda: features(20, 32),
    ),
    "speech_to_text": Row(
        "Speech2TextForConditionalGeneration",
        {
            "vocab_size": 96,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "input_feat_per_channel": 16,
            "conv_channels": 32,
            "max_source_positions": 64,
            "max_target_positions": 32,
        },
        lambda: {**features(24, 16), "decoder_input_ids": tokens(2, 6)},
    ),
    "audio_spectrogram": Row(
        "ASTForAudioClassification",
        {**SMALL, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": wave(2, 32, 16)},
    ),
    "moonshine": Row(
        "MoonshineForConditionalGeneration",
        {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "decoder_start_token_id": 0,
        },
        lambda: {"input_values": wave(2, 4000), "decoder_input_ids": tokens(2, 6)},
    ),
    "hifigan": Row(
        "SpeechT5HifiGan",
        {
            "model_in_dim": 16,
            "upsample_initial_channel": 32,
            "upsample_rates": [2, 2],
            "upsample_kernel_sizes": [4, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
        },
        lambda: {"spectrogram": wave(2, 20, 16)},
    ),
}

OTHERS = {
    "patchtst": Row(
        "PatchTSTForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "prediction_length": 8,
        },
        lambda: {"past_values": wave(2, 32, 2)},
    ),
}
