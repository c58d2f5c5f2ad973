"""From fused ops to what an artefact carries: packed constants, and a reason for every refusal."""
