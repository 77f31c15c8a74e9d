"""Weights of the published Delta-LLaVA code, under the names that this package gives them."""

import re

import torch


# Published name (a regular expression over its beginning) and ours, in the order of the projector's steps.
_RENAMED = {
    r"combined_block\.ntb\.patch_embed\.conv\.": "refinement_block.attention_input.",
    r"combined_block\.ntb\.norm_mhsa\.": "refinement_block.attention.input_norm.",
    r"combined_block\.ntb\.e_mhsa\.norm\.": "refinement_block.attention.norm.",
    r"combined_block\.ntb\.e_mhsa\.([qkv])\.": r"refinement_block.attention.\1_proj.",
    r"combined_block\.ntb\.e_mhsa\.proj\.": "refinement_block.attention.out_proj.",
    r"combined_block\.ntb\.projection\.conv\.": "refinement_block.convolution_input.",
    r"combined_block\.ntb\.mhca\.group_conv3x3\.": "refinement_block.convolution.grouped.",
    r"combined_block\.ntb\.mhca\.norm\.": "refinement_block.convolution.norm.",
    r"combined_block\.ntb\.mhca\.projection\.": "refinement_block.convolution.pointwise.",
    r"combined_block\.ntb\.mlp\.conv1\.": "refinement_block.mlp.0.",
    r"combined_block\.ntb\.mlp\.conv2\.": "refinement_block.mlp.2.",
    r"q_proj_1\.": "query_projection.",
    r"k_proj_1\.": "key_projection.",
    r"v_proj_1\.": "value_projection.",
    r"clip_attn\.": "attention.",
    r"mlp\.": "mlp.",
}


def projector_from_released(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames the weights of a published projector.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Published names, without the prefix `model.mm_projector.` that they have
            in a checkpoint.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors under names that `DeltaProjector` loads with `strict=True`.

    Raises:
        ValueError: If a name is not one of the published projector's.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for published, ours in _RENAMED.items():
            new_name, count = re.subn(f"^{published}", ours, name)
            if count:
                renamed[new_name] = tensor
                break
        else:
            raise ValueError(
                f"{name!r} is no weight of the published projector, whose names begin with"
                " q_proj_1, k_proj_1, v_proj_1, clip_attn, mlp or combined_block.ntb."
            )
    return renamed
