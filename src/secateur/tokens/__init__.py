"""Token elimination: which tokens a layer hands on (scores), where they are (layout), and how (handover)."""
