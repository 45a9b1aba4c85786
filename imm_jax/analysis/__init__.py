"""What a model's layers do for a data set, how training changes them, and how diverse its answers are."""

# The weights of a layer that eq. 2 to 4 sum over, and the block that holds each.
MODULES = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
           "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
# Of layer importance: eq. 3 and eq. 2.
ORDERS = (1, 2)
