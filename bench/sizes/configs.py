"""The two models that are measured and reckoned with: a mid-size one, and the released size."""

import twotower_kernels as tt

CONFIG = tt.TwoTowerConfig(
    vocab_size=32768,
    hidden_size=1024,
    hybrid_override_pattern="MEMEM*EMEMEM*E",
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=32,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    conv_kernel=4,
    n_routed_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=512,
    moe_shared_expert_intermediate_size=1024,
    routed_scaling_factor=2.5,
)

RELEASED = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def config(pattern: str = RELEASED) -> tt.TwoTowerConfig:
    """The released model, or one of its sizes with other layers."""
    return tt.TwoTowerConfig(
        vocab_size=131072,
        hidden_size=2688,
        hybrid_override_pattern=pattern,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        conv_kernel=4,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5,
    )
