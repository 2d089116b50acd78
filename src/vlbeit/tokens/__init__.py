"""Words to subword ids and pictures to visual codes."""
